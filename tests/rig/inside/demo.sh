# The main job for some seconds: a real front-end's frames, both ways at once, through our process and a card.
# Leaves stats.json in the out folder; the caller draws it.
#
# usage: demo.sh card      in the rig: vfio-pci, an IOMMU, an igb
#        demo.sh tap NAME  on a plain machine, in a network namespace of its own: an interface in the card's place
. "$(dirname "$0")/lib.sh"
seconds=${RIG_SECONDS:-10}

fail() {
	echo "demo: $1" >&2
	tail -n 5 "$LOGS/backend.log" >&2
	exit 1
}

case $1 in
card)
	hugepages 400 || fail "no huge pages"
	bind_to "$(card 1)" vfio-pci || fail "cannot bind the card to vfio-pci"
	peer_up || fail "no link"
	backend_start "$(card 1)" || fail "the back end does not start"
	front_end_start --single-file-segments -m 128
	;;
tap)
	ip link set lo up
	PEER=$2
	backend_start "tap:$PEER" || fail "the back end does not start"
	quiet_interface "$PEER"
	# 4 KiB pages in a memfd: no huge pages to be had without changing the machine.
	front_end_start --no-huge -m 64
	;;
esac
grep -m 1 -i 'iommu' "$LOGS/backend.log" | sed 's/^/demo: the back end says: /'
status=0
echo "demo: frames of 1514 bytes both ways at once, for $seconds s, each one's contents checked"
both_ways --seconds "$seconds" --size 1514 >"$RUN/result" || status=1
tr ';' '\n' <"$RUN/result" | sed 's/^ */demo: /'
stats >"$LOGS/stats.json" || fail "no statistics"
backend_stop >"$RUN/result" || status=1
sed 's/^/demo: the back end: /' "$RUN/result"
front_end_stop
exit $status
