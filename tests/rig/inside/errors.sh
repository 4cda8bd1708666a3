# What goes wrong for an operator, each told so that he can mend it, and nothing left behind.
# Wants two cards more, behind root ports without ACS, and so in one IOMMU group: see `test`.
. "$(dirname "$0")/lib.sh"

# says NAME PATTERN OPTION..: our process ends by itself with an error, and prints what matches.
says() {
	# A log of its own: another of our processes may be writing the usual one.
	local name=$1 pattern=$2 status=0 log=$LOGS/backend-$1.log
	shift 2
	timeout 20 "$PROGRAM" --socket-path "$SOCKET" --control "$CONTROL" "$@" >"$log" 2>&1 || status=$?
	case $status in
	0 | 101 | 124 | 13[0-9]) not_ok "$name" "ended with status $status: $(tail -n 1 "$log")" ;;
	*)
		if tr '\n' ' ' <"$log" | grep -qE "$pattern"; then
			ok "$name" "$(grep -vE 'DEBUG|INFO' "$log" | tr -s '\n ' ' ')"
		else
			not_ok "$name" "not in the words of /$pattern/: $(tail -n 3 "$log" | tr '\n' ' ')"
		fi
		;;
	esac
}

first=$(card 1)
bind_to "$first" vfio-pci
says no-such-device "0000:7f:1f\.0" --device 0000:7f:1f.0
says not-bound "$(card 2).*driver_override.*drivers_probe" --device "$(card 2)"

# The two commands it prints are the ones that bind it.
bind_as_told() {
	local commands
	commands=$(grep -E '^ *echo ' "$LOGS/backend-not-bound.log")
	[ -n "$commands" ] || { echo "it printed no commands" && return 1; }
	bash -ec "$commands" && [ "$(basename "$(readlink "/sys/bus/pci/devices/$(card 2)/driver")")" = vfio-pci ] &&
		echo "$(card 2) is bound to vfio-pci after $(wc -l <<<"$commands") commands as printed"
}
check not-bound-commands bind_as_told

# Both cards of the shared group have the kernel's driver; one of them goes to vfio-pci.
shared=$(card 3) sibling=$(card 4)
if [ "$(group_of "$shared")" = "$(group_of "$sibling")" ]; then
	bind_to "$shared" vfio-pci
	says group-not-viable-type1 "not viable.*$sibling" --device "$shared" --iommu type1
	[ ! -e /dev/iommu ] || says group-not-viable-iommufd "not viable.*$sibling|$sibling" --device "$shared" --iommu iommufd
else
	not_ok group-not-viable "the rig's two cards are not in one group"
fi

SOCKET=/run/nowhere/vm0.sock says socket-folder "/run/nowhere" --device "$first"
if backend_start "$first"; then
	SOCKET=$RUN/vuv/other.sock CONTROL=$RUN/vuv/other-control.sock says device-busy "$first" --device "$first"
	CONTROL=$RUN/vuv/other-control.sock says socket-in-use "$SOCKET" --device tap:busy0
	check still-stops backend_stop
else
	not_ok start "$(tail -n 1 "$LOGS/backend.log")"
fi
left=$(ls "$RUN/vuv")
if [ -z "$left" ]; then ok nothing-left "no socket remains"; else not_ok nothing-left "still there: $left"; fi
results=9
[ ! -e /dev/iommu ] || results=10
finish $results
