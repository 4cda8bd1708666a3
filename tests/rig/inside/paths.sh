# Frames of two sizes, both directions, contents checked, through each of the named maps, wherever the front-end's
# memory lies and however few addresses the IOMMU has.
#
# usage: paths.sh IOMMU/ASKED/MAPPED..   the IOMMU back end, `--map-by`, and how the memory must come out mapped
. "$(dirname "$0")/lib.sh"

# With a small aperture the front-end's addresses, which are its guest-physical ones, are out of it (TRAPS 30).
far=()
[ "$RIG_AW_BITS" -ge 47 ] || far=(--base-virtaddr 0x7e0000000000)

# Usable IOVAs end where the IOMMU does, also if the front-end's addresses do not.
aperture() {
	local memory
	memory=$(grep -m 1 /dev/hugepages/ "/proc/$FRONT_END/maps" | cut -d - -f 1)
	stats | python3 -c '
import json, sys
bits, memory = int(sys.argv[1]), int(sys.argv[2], 16)
chart = json.load(sys.stdin)["maps"][0]
last = int(chart["usable"][-1].split("-")[-1].strip(" .="), 16)
highest = max(int(extent["iova"], 16) + extent["len"] - 1 for extent in chart["extents"])
print(f"usable up to {last:#x}, mapped up to {highest:#x}, memory of the front-end at {memory:#x}")
sys.exit(last != (1 << bits) - 1 or highest > last or (bits < 47 and memory <= last))' "$RIG_AW_BITS" "$memory"
}

hugepages 400
bind_to "$(card 1)" vfio-pci
peer_up
results=0
for way; do
	IFS=/ read -r iommu asked mapped <<<"$way"
	name=$iommu-$mapped
	[ "$asked" != auto ] || name=$name-unasked
	results=$((results + 9))
	check "$name-map-check" "$RIG_TOOLS/examples/map-check" "$(card 1)" "$iommu" "$asked"
	cp "$RUN/seen" "$LOGS/map-check-$name.log"
	if ! backend_start "$(card 1)" --iommu "$iommu" --map-by "$asked"; then
		not_ok "$name-start" "$(tail -n 1 "$LOGS/backend.log")"
		continue
	fi
	front_end_start --single-file-segments -m 128 "${far[@]}"
	check "$name-tx-64" tx --count 5000 --size 64
	check "$name-tx-1514" tx --count 5000 --size 1514
	check "$name-rx-64" rx --count 5000 --size 64
	check "$name-rx-1514" rx --count 5000 --size 1514
	check "$name-both-ways" both_ways --count 5000 --size 1514
	check "$name-zero-copy" stats_show --iommu "$iommu" --map-by "$mapped" --at-least 15000
	check "$name-aperture" aperture
	rx --seconds 600 --idle-ms 500 --up-within-ms 5000 >/dev/null &
	traffic=$!
	wait_for 10 "traffic to stop under" frames_move
	check "$name-stop-under-traffic" backend_stop
	wait $traffic
	front_end_stop
	cp "$LOGS/backend.log" "$LOGS/backend-$name.log"
done
finish $results
