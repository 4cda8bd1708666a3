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

	check "$iommu-open-in-three-lines" opened

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

# The example of the library's short way, as a user who owns these nodes and no others: it prints the card's address
# and link, and the peer's card receives its frame.
opened() {
	local status=0
	timeout 60 python3 -c '
import socket, sys
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88b5))
wire.bind((sys.argv[1], 0))
print("listening", flush=True)
frame = wire.recv(2048)
print(frame[:6].hex(":"), "from", frame[6:12].hex(":"), frame[14:].rstrip(b"\0").decode())' "$PEER" >"$RUN/heard" &
	local listener=$!
	wait_for 20 "the listener" grep -q listening "$RUN/heard"
	$(as_user $((8 << 20))) "$RUN/open" "$(card 1)" >"$RUN/opened" 2>&1 || status=$?
	cat "$RUN/opened"
	[ $status = 0 ] || { kill $listener && return 1; }
	wait $listener || { echo "the peer heard nothing" && return 1; }
	grep -q "$(card 1) mac $GUEST_MAC link up" "$RUN/opened" || return 1
	grep "ff:ff:ff:ff:ff:ff from $GUEST_MAC one frame, by an unprivileged user" "$RUN/heard"
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
install -m 755 "$RIG_TOOLS/examples/open" "$RUN/open"
bind_to "$(card 1)" vfio-pci
peer_up
chown $user:$user "$RUN/vuv"
results=0
if [ -e /dev/iommu ]; then
	one_iommu iommufd "$(cdev_of "$(card 1)")" /dev/iommu
	results=$((results + 8))
	# What is left is type1, also for a program that would rather have iommufd.
	chown root:root /dev/iommu "$(cdev_of "$(card 1)")"
fi
one_iommu type1 "/dev/vfio/$(group_of "$(card 1)")"
finish $((results + 8))
