# How long one frame takes there and back, and what an idle process costs: by our process at several poll_us, and by
# DPDK in its place, in turns, with the same front-end and the same echo.
#
# usage: latency.sh card      in the rig: vfio-pci, an igb, and the kernel's igb as the peer
#        latency.sh tap NAME  on a plain machine, in a network namespace of its own: a tap, which copies for both
#        latency.sh model     on a plain machine: the cost of idling alone, over vfio-user with the card model
#
#   peer's packet socket ── card or tap ── the back end ── virtio-user, which sends each frame back (testpmd, macswap)
#
# RIG_ROUNDS turns of RIG_COUNT round trips; RIG_IDLE_S seconds without a frame. Back ends have CPU 0, the front-end, which
# polls and never sleeps, CPU 1, and who measures what is left of both.
. "$(dirname "$0")/lib.sh"
rounds=${RIG_ROUNDS:-3} count=${RIG_COUNT:-1000} idle_s=${RIG_IDLE_S:-60}
names=(poll_us=0 poll_us=50 poll_us=always dpdk)

# On a plain machine nothing of ours is to stay.
trap 'kill $(jobs -p) 2>/dev/null || :' EXIT
fail() {
	echo "latency: $1" >&2
	tail -n 5 "$LOGS/backend.log" "$LOGS/front-end.log" >&2
	exit 1
}

echo_start() {
	dpdk-testpmd --lcores 0@1,1@1 --no-pci --file-prefix echo "${memory[@]}" \
		--vdev "net_virtio_user0,path=$SOCKET,mac=$GUEST_MAC,queue_size=256,mrg_rxbuf=1,in_order=1" \
		-- --forward-mode=macswap --auto-start --total-num-mbufs=2048 --stats-period 3600 >"$LOGS/front-end.log" 2>&1 &
	FRONT_END=$!
}
ping_pong() { "$RIG_TOOLS/wire-check" ping-pong --iface "$PEER" --dst $GUEST_MAC --json "$@" >"$RUN/seen" 2>&1; }

# turn NAME: its round trips; their figures become a line of $RUN/figures.
turn() {
	local name=$1
	case $name in
	dpdk) RIG_STAND_IN=yes backend_start "$device" || fail "testpmd does not start" ;;
	*) backend_start "$device" --cpus 0 --poll-us "${name#*=}" || fail "the back end does not start" ;;
	esac
	wait_for 30 "the peer's interface" ip link show dev "$PEER" || fail "no $PEER"
	quiet_interface "$PEER"
	echo_start
	ping_pong --count "$count" || fail "$name: $(cat "$RUN/seen")"
	sed -E "s/.*\"median_us\":([0-9.]+),\"p99_us\":([0-9.]+).*/$name \1 \2/" "$RUN/seen" >>"$RUN/figures"
	front_end_stop
	backend_stop >/dev/null || fail "the back end does not stop"
}

# The median over the turns of figure COLUMN of NAME.
median_of() {
	awk -v name="$1" -v column="$2" '$1 == name { print $column }' "$RUN/figures" | sort -n |
		awk '{ all[NR] = $1 } END { print all[int((NR + 1) / 2)] }'
}

latency() {
	local round name
	: >"$RUN/figures"
	for ((round = 0; round < rounds; round++)); do
		for name in "${names[@]}"; do turn "$name"; done
	done
	cp "$RUN/figures" "$LOGS/figures"
	echo "latency: $1: a frame of 60 bytes there and back, medians over $rounds turns of $count, in microseconds"
	for name in "${names[@]}"; do
		printf 'latency: %-16s median %9.1f   p99 %9.1f\n' "$name" "$(median_of "$name" 2)" "$(median_of "$name" 3)"
	done
}

# Processor time of the back end: clock ticks as /proc/PID/stat has them (utime + stime), and microseconds by its threads
# where the kernel counts them.
ticks() { awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$BACKEND/stat"; }
microseconds() { cat /proc/"$BACKEND"/task/*/schedstat 2>/dev/null | awk '{ sum += $1 } END { printf "%d\n", sum / 1000 }'; }
passes() { stats | grep -o '"passes": *[0-9]*' | grep -o '[0-9]*$'; }

# A guest that is connected and says nothing.
idle() {
	local before passed exact=
	backend_start "$device" || fail "the back end does not start"
	[ -z "${PEER:-}" ] || quiet_interface "$PEER"
	echo_start
	if [ -n "${PEER:-}" ]; then ping_pong --count 10 || fail "idle: $(cat "$RUN/seen")"; fi
	has_guest() { stats | grep -q '"running": *true'; }
	wait_for 60 "a guest" has_guest || fail "no guest"
	sleep 2
	passed=$(passes) before=("$(ticks)" "$(microseconds)")
	sleep "$idle_s"
	[ "${before[1]}" = 0 ] || exact=", $(($(microseconds) - before[1])) us on a CPU"
	printf 'latency: %s, idle for %s s with a guest: utime + stime %d ticks of %d a second%s, %d passes\n' \
		"$1" "$idle_s" $(($(ticks) - before[0])) "$(getconf CLK_TCK)" "$exact" $(($(passes) - passed))
	front_end_stop
	backend_stop >/dev/null || fail "the back end does not stop"
}

memory=(--no-huge -m 64)
case $1 in
card)
	device=$(card 1)
	memory=(--single-file-segments -m 128)
	hugepages 400 && bind_to "$device" vfio-pci && peer_up || fail "no huge pages, card or peer"
	latency "an igb in the rig"
	idle "an igb in the rig"
	;;
tap)
	device=tap:$2 PEER=$2
	ip link set lo up
	latency "a tap"
	idle "a tap"
	;;
model)
	device=vfio-user:$RUN/card.sock
	"$RIG_TOOLS/card-model" --socket "$RUN/card.sock" --wire-local "$RUN/local" --wire-peer "$RUN/peer" >"$LOGS/model.log" 2>&1 &
	model=$!
	wait_for 10 "the card model" test -S "$RUN/card.sock" || fail "no card model"
	idle "the card model over vfio-user"
	kill -TERM $model && wait $model || fail "the card model saw a rule broken"
	;;
*) fail "on what? card, tap NAME or model" ;;
esac
