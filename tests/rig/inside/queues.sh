# Several queue pairs on one card: frames of sixteen flows each way, contents and order of each checked, spread by the card
# over the pairs.
#
# usage: queues.sh PAIRS..
. "$(dirname "$0")/lib.sh"

# Sixteen runs at once, each one flow of UDP. The last line says how many came through whole and in order.
flows() {
	local direction=$1 flow runs=() whole=0
	for flow in {1..16}; do
		"$direction" --flow $((1000 + flow)) --count 300 --size 512 --window 8 >"$RUN/flow-$flow" 2>&1 &
		runs+=($!)
	done
	for flow in "${runs[@]}"; do
		if wait "$flow"; then whole=$((whole + 1)); fi
	done
	cat "$RUN"/flow-*
	echo "$whole of 16 flows: $(tail -qn 1 "$RUN"/flow-1)"
	[ $whole = 16 ]
}

# Frames of each lane; at least so many of each direction moved some. On the way out the kernel deals flows to testpmd's
# queues by a hash of its own.
spread() {
	stats | python3 -c '
import json, sys
lanes = json.load(sys.stdin)["ports"][0]["lanes"]
print("; ".join("{}: {}".format(way, " ".join(str(lane["frames"]) for lane in lanes if lane["direction"] == way))
                for way in ("rx", "tx")))
busy = {way: sum(lane["frames"] > 0 for lane in lanes if lane["direction"] == way) for way in ("rx", "tx")}
copied = sum(lane["copied_bytes"] for lane in lanes)
pairs, least = int(sys.argv[1]), int(sys.argv[2])
sys.exit(len(lanes) != 2 * pairs or copied or min(busy.values()) < least)' "$@"
}

hugepages 400
bind_to "$(card 1)" vfio-pci
peer_up
results=0
for pairs; do
	results=$((results + 5))
	# The key of the published test vectors: which flows meet on one pair is the same each time.
	key=6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa
	if ! backend_start "$(card 1)" --queue-pairs "$pairs" --rss-key $key --cpus 0,1; then
		not_ok "$pairs-pairs-start" "$(tail -n 1 "$LOGS/backend.log")"
		continue
	fi
	FRONT_END_PAIRS=$pairs
	front_end_start --single-file-segments -m 192
	check "$pairs-pairs-first" both_ways --count 1000 --size 1514
	check "$pairs-pairs-rx" flows rx
	check "$pairs-pairs-tx" flows tx
	check "$pairs-pairs-spread" spread "$pairs" $((pairs < 4 ? pairs : 4))
	check "$pairs-pairs-stop" backend_stop
	front_end_stop
	cp "$LOGS/backend.log" "$LOGS/backend-$pairs.log"
done
finish $results
