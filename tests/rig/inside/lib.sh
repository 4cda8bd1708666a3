# What the scripts inside the rig share: the cards, the back end, the front-end, and how a result is told.
# Sourced. RIG_BINARY is our program, RIG_TOOLS the folder of wire-check and picture, both set by the caller of `boot`.

export RUST_BACKTRACE=0
RUN=${RIG_RUN:-/run}
LOGS=${RIG_LOGS:-/mnt}   # the out folder: what is left there can be read after power-off
SOCKET=$RUN/vuv/vm0.sock # in a folder of its own, so that a container can be given just that
CONTROL=$RUN/vuv/control.sock
GUEST_MAC=52:54:00:00:00:01
mkdir -p "$RUN/vuv"
# A copy, since the checkout may lie where only its owner may go, and the tests run it as somebody else.
PROGRAM=$RUN/vhost-user-vfio
[ -n "${RIG_STAND_IN:-}" ] || install -m 755 "$RIG_BINARY" "$PROGRAM"

# ---- results: one line each; `test` outside counts them -------------------------------------------------------

failures=0
ok() { echo "ok $1: $2"; }
not_ok() {
	echo "not ok $1: $2"
	failures=$((failures + 1))
}
# Ends a script: how many results there had to be, so that one which never came is noticed.
finish() {
	echo "expected $1"
	exit $((failures > 0))
}
# Runs a command as result NAME; its last line is what was seen.
check() {
	local name=$1 verdict=ok
	shift
	# Not in a subshell, which could not wait for this shell's children.
	"$@" >"$RUN/seen" 2>&1 || verdict=not_ok
	$verdict "$name" "$(tail -n 1 "$RUN/seen")"
}
# Waits until a command succeeds. Nested emulation is slow, so the bound is generous; it decides only failures.
wait_for() {
	local seconds=$1 what=$2 deadline
	shift 2
	deadline=$((SECONDS + seconds))
	until "$@" >/dev/null 2>&1; do
		[ $SECONDS -lt $deadline ] || { echo "rig: waited $seconds s for $what" >&2 && return 1; }
		sleep 0.1
	done
}

# ---- the cards ------------------------------------------------------------------------------------------------

cards() { grep -l 0x10c9 /sys/bus/pci/devices/*/device | xargs -n 1 dirname | xargs -n 1 basename | sort; }
card() { cards | sed -n "$1p"; }
group_of() { basename "$(readlink "/sys/bus/pci/devices/$1/iommu_group")"; }
cdev_of() { echo "/dev/vfio/devices/$(ls "/sys/bus/pci/devices/$1/vfio-dev")"; }

bind_to() {
	local address=$1 driver=$2 device=/sys/bus/pci/devices/$1
	echo "$driver" >"$device/driver_override"
	[ ! -e "$device/driver" ] || echo "$address" >"$device/driver/unbind"
	echo "$address" >/sys/bus/pci/drivers_probe
	[ "$(basename "$(readlink "$device/driver")")" = "$driver" ]
}

# The last card, with the kernel's driver: whoever is on the other end of the wire. Sets PEER.
peer_up() {
	local address
	address=$(cards | tail -n 1)
	PEER=$(ls "/sys/bus/pci/devices/$address/net")
	quiet_interface "$PEER"
	wait_for 20 "link on $PEER" grep -q 1 "/sys/class/net/$PEER/carrier"
}

# Up, taking every frame, and saying nothing by itself.
quiet_interface() {
	echo 1 >"/proc/sys/net/ipv6/conf/$1/disable_ipv6" 2>/dev/null || :
	ip link set "$1" up promisc on
}

hugepages() {
	echo "$1" >/proc/sys/vm/nr_hugepages
	mountpoint -q /dev/hugepages || mount -t hugetlbfs none /dev/hugepages
	[ "$(cat /proc/sys/vm/nr_hugepages)" -ge "$1" ]
}

# ---- the back end ---------------------------------------------------------------------------------------------

# Starts our process on a card with further options and waits until it serves. Sets BACKEND.
# As somebody else: BACKEND_AS="prlimit .. setpriv .." (a command that runs another).
backend_start() {
	local address=$1
	shift
	rm -f "$SOCKET"
	if [ -n "${RIG_STAND_IN:-}" ]; then
		stand_in_start "$address"
	else
		backend_run --device "$address" --socket-path "$SOCKET" --control "$CONTROL" "$@"
	fi
	BACKEND=$!
	backend_comes_up
}

# The same with the ports and maps of a configuration file.
backend_start_with() {
	backend_run --config "$@"
	BACKEND=$!
	backend_comes_up
}

backend_run() { ${BACKEND_AS:-} "$PROGRAM" "$@" >"$LOGS/backend.log" 2>&1 & }

backend_comes_up() {
	# Sockets are bound before devices are opened, so a socket alone says little.
	backend_is_up() {
		if [ -n "${RIG_STAND_IN:-}" ]; then [ -S "$SOCKET" ]; else grep -q ' ready ' "$LOGS/backend.log"; fi
	}
	backend_is_up_or_gone() { backend_is_up || ! kill -0 $BACKEND; }
	wait_for 30 "the back end to be ready" backend_is_up_or_gone
	backend_is_up || { tail -n 5 "$LOGS/backend.log" && return 1; }
}

# DPDK's vhost driver and its igb or tap driver in our place: shows that the rig works, whatever our process does.
stand_in_start() {
	local device
	case $1 in
	tap:*) device=(--no-huge -m 64 --no-pci --vdev "net_tap0,iface=${1#tap:}") ;;
	*) device=(-m 128 -a "$1") && hugepages 400 ;;
	esac
	dpdk-testpmd --lcores 0@0,1@0 --file-prefix backend "${device[@]}" --vdev "net_vhost0,iface=$SOCKET,queues=1" -- \
		--forward-mode=io --auto-start --total-num-mbufs=8192 --stats-period 3600 >"$LOGS/backend.log" 2>&1 &
}

# SIGTERM, and 0 as the answer.
backend_stop() {
	kill -TERM $BACKEND 2>/dev/null || :
	local status=0
	wait $BACKEND || status=$?
	[ $status = 0 ] || { echo "the back end ended with $status: $(tail -n 1 "$LOGS/backend.log")" && return 1; }
	echo "exit status 0 on SIGTERM"
}

# What the statistics show, checked by `picture`, as one line; further words are its requirements.
stats_show() { stats >"$LOGS/stats.json" && "$RIG_TOOLS/picture" --line "$@" "$LOGS/stats.json"; }
stats() { "$PROGRAM" stats --control "$CONTROL" "$@"; }

# ---- the front-end: testpmd's virtio-user, with a veth pair so that any program can send and receive through it --
#
#   guest0 ══veth══ guest0w ── af_packet port ── testpmd ── virtio-user port ── the back end's socket
#
# As with BACKEND_AS, FRONT_END_AS is a command that runs it as somebody else or somewhere else.
# With several queue pairs: FRONT_END_PAIRS=2.
# A second one beside it: FRONT_END_VETH=guest1, with a socket and a GUEST_MAC of its own.
FRONT_END_VETH=guest0
FRONT_END_PAIRS=1

front_end_veth() {
	[ -e /sys/class/net/$FRONT_END_VETH ] || ip link add $FRONT_END_VETH type veth peer name ${FRONT_END_VETH}w
	quiet_interface $FRONT_END_VETH
	quiet_interface ${FRONT_END_VETH}w
}

# How testpmd is called, one word per line; further words are EAL options (its memory).
front_end_command() {
	printf '%s\n' dpdk-testpmd --lcores 0@0,1@1 --no-pci --file-prefix front-$FRONT_END_VETH "$@" \
		--vdev "net_virtio_user0,path=$SOCKET,mac=$GUEST_MAC,queue_size=256,mrg_rxbuf=1,in_order=1$(virtio_pairs)" \
		--vdev net_af_packet0,iface=${FRONT_END_VETH}w,framecnt=512,blocksz=4096,framesz=2048,qpairs=$FRONT_END_PAIRS \
		-- --forward-mode=io --auto-start --total-num-mbufs=$((4096 + 4096 * FRONT_END_PAIRS)) --stats-period 3600 \
		--rxq=$FRONT_END_PAIRS --txq=$FRONT_END_PAIRS
}

# virtio-user has a control queue only where it has several pairs to turn on and off.
virtio_pairs() { [ "$FRONT_END_PAIRS" = 1 ] || printf ',queues=%d,cq=1' "$FRONT_END_PAIRS"; }

# Starts it with these EAL options. Sets FRONT_END.
front_end_start() {
	local command
	front_end_veth
	mapfile -t command < <(front_end_command "$@")
	${FRONT_END_AS:-} "${command[@]}" >"$LOGS/front-end-$FRONT_END_VETH.log" 2>&1 &
	FRONT_END=$!
}

front_end_stop() {
	kill -TERM $FRONT_END 2>/dev/null || :
	front_end_is_gone() { ! kill -0 $FRONT_END; }
	wait_for 10 "the front-end to end" front_end_is_gone || kill -KILL $FRONT_END
	wait $FRONT_END 2>/dev/null || : # testpmd's own status says nothing of ours
}

# Frames from guest to wire (tx), from wire to guest (rx), or both at once; further words go to wire-check.
tx() { "$RIG_TOOLS/wire-check" through --from $FRONT_END_VETH --to "$PEER" "$@"; }
rx() { "$RIG_TOOLS/wire-check" through --from "$PEER" --to $FRONT_END_VETH --dst $GUEST_MAC "$@"; }
# Whether frames passed the peer's card since this was last asked.
frames_move() {
	local before=${frames_seen:-0}
	frames_seen=$(cat "/sys/class/net/$PEER/statistics/tx_packets")
	[ "$frames_seen" -gt "$before" ] && [ "$before" != 0 ]
}
both_ways() {
	local seen status=0
	rx "$@" >"$RUN/rx-$FRONT_END_VETH.seen" 2>&1 &
	local other=$!
	seen=$(tx "$@" 2>&1) || status=1
	wait $other || status=1
	echo "$seen; $(cat "$RUN/rx-$FRONT_END_VETH.seen")"
	return $status
}
