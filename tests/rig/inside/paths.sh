# Frames of two sizes, both directions, contents checked, through each of the named maps.
#
# usage: paths.sh IOMMU/ASKED/MAPPED..   the IOMMU back end, `--map-by`, and how the memory must come out mapped
. "$(dirname "$0")/lib.sh"

hugepages 400
bind_to "$(card 1)" vfio-pci
peer_up
results=0
for way; do
	IFS=/ read -r iommu asked mapped <<<"$way"
	name=$iommu-$mapped
	[ "$asked" != auto ] || name=$name-unasked
	results=$((results + 7))
	if ! backend_start "$(card 1)" --iommu "$iommu" --map-by "$asked"; then
		not_ok "$name-start" "$(tail -n 1 "$LOGS/backend.log")"
		continue
	fi
	front_end_start --single-file-segments -m 128
	check "$name-tx-64" tx --count 5000 --size 64
	check "$name-tx-1514" tx --count 5000 --size 1514
	check "$name-rx-64" rx --count 5000 --size 64
	check "$name-rx-1514" rx --count 5000 --size 1514
	check "$name-both-ways" both_ways --count 5000 --size 1514
	check "$name-zero-copy" stats_show --iommu "$iommu" --map-by "$mapped" --at-least 15000
	rx --seconds 600 --idle-ms 500 >/dev/null &
	traffic=$!
	wait_for 10 "traffic to stop under" frames_move
	check "$name-stop-under-traffic" backend_stop
	wait $traffic
	front_end_stop
	cp "$LOGS/backend.log" "$LOGS/backend-$name.log"
done
finish $results
