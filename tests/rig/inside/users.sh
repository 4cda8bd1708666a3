# Our process as a user who owns nothing but the nodes of the device, with a limit on locked memory; and what it
# says where the nodes are somebody else's or the limit is too small.
. "$(dirname "$0")/lib.sh"

user=65534
as_user() { echo "prlimit --memlock=$1:$1 setpriv --reuid=$user --regid=$user --clear-groups --inh-caps=-all --bounding-set=-all"; }
fits=$((192 << 20)) too_small=$((32 << 20)) # the front-end's memory is 128 MiB

# The line that names the bytes needed and the limit.
both_numbers() {
	wait_for 20 "an error about locked memory" grep -q "$too_small" "$LOGS/backend.log" || return 1
	local line
	line=$(grep -m 1 "$too_small" "$LOGS/backend.log")
	echo "$line"
	# Beside the limit there is a larger number: what is needed.
	grep -oE '[0-9]{8,}' <<<"$line" | awk -v limit=$too_small '$1 > limit { found = 1 } END { exit !found }'
}

one_iommu() {
	local iommu=$1
	shift
	chown root:root "$@"
	chmod 0600 "$@"
	check "$iommu-no-permission" refused "$iommu" "$@"
	chown $user:$user "$@"

	BACKEND_AS=$(as_user $fits)
	if backend_start "$(card 1)" --iommu "$iommu"; then
		front_end_start --single-file-segments -m 128
		check "$iommu-unprivileged-tx" tx --count 3000 --size 1514
		check "$iommu-unprivileged-rx" rx --count 3000 --size 1514
		check "$iommu-unprivileged-zero-copy" stats_show --iommu "$iommu" --at-least 3000
		check "$iommu-unprivileged-stop" backend_stop
		front_end_stop
	else
		not_ok "$iommu-unprivileged-start" "$(tail -n 1 "$LOGS/backend.log")"
	fi
	cp "$LOGS/backend.log" "$LOGS/backend-$iommu.log"

	BACKEND_AS=$(as_user $too_small)
	if backend_start "$(card 1)" --iommu "$iommu"; then
		front_end_start --single-file-segments -m 128
		check "$iommu-memlock-too-small" both_numbers
		front_end_stop
		check "$iommu-memlock-process-lives" backend_stop
	else
		not_ok "$iommu-memlock-start" "$(tail -n 1 "$LOGS/backend.log")"
	fi
	cp "$LOGS/backend.log" "$LOGS/backend-$iommu-too-small.log"
}

# Ends with an error that names a node, any of those given.
refused() {
	local iommu=$1
	shift
	BACKEND_AS=$(as_user "$fits")
	if backend_start "$(card 1)" --iommu "$iommu" >/dev/null; then
		backend_stop
		echo "it started, though $* are root's"
		return 1
	fi
	grep -F -m 1 "$(printf '%s\n' "$@")" "$LOGS/backend.log" || { tail -n 1 "$LOGS/backend.log" && return 1; }
}

hugepages 400
bind_to "$(card 1)" vfio-pci
peer_up
chown $user:$user "$RUN/vuv"
results=0
if [ -e /dev/iommu ]; then
	one_iommu iommufd "$(cdev_of "$(card 1)")" /dev/iommu
	results=$((results + 7))
fi
one_iommu type1 "/dev/vfio/$(group_of "$(card 1)")"
finish $((results + 7))
