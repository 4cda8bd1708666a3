# How long it takes to map a guest's memory for a card, to map it for a second socket of the same guest, and to take
# it away: by our process on iommufd and on type1, and by DPDK's own VFIO container, one after the other.
#
# usage: figures.sh        in the rig, with two cards for vfio-pci
#        figures.sh books  on a plain machine, in a network namespace of its own: taps, and a map that pins nothing
#
# RIG_GIB: sizes of guest memory in GiB, largest last. RIG_ROUNDS: how often each is measured. No frame flows.
. "$(dirname "$0")/lib.sh"

sizes=${RIG_GIB:-1,8} rounds=${RIG_ROUNDS:-3}
largest=${sizes##*,}
sockets=("$RUN/vuv/vm0.sock" "$RUN/vuv/vm1.sock")

fail() {
	echo "figures: $1" >&2
	exit 1
}
map_time() {
	"$RIG_TOOLS/map-time" --first "${sockets[0]}" --second "${sockets[1]}" --gib "$sizes" --rounds "$rounds" "$@" ||
		fail "no figure: $(tail -n 1 "$LOGS/backend.log")"
}

# ours IOMMU PAGES..: two ports on one map, with these devices.
ours() {
	local iommu=$1 pages
	shift
	cat >"$RUN/config.toml" <<-END
		control = "$CONTROL"
		[map.main]
		iommu = "$iommu"
		[port.vm0]
		device = "${devices[0]}"
		socket-path = "${sockets[0]}"
		[port.vm1]
		device = "${devices[1]}"
		socket-path = "${sockets[1]}"
	END
	backend_start_with "$RUN/config.toml" || fail "the back end does not start"
	for pages; do map_time --label "$iommu" --pages "$pages"; done
	backend_stop >/dev/null || fail "the back end does not stop"
}

# DPDK's container: all VFIO_IOMMU_MAP_DMA calls of testpmd's start with this much memory, and their times, as strace -T
# has them (its own cost is in them: some ten microseconds each, and under emulation a hundred). Once: most of a start
# is the clearing of huge pages, which is not counted and takes minutes under emulation. One file, as one for each page
# is more than a process may open.
dpdk() {
	local gib=$1
	# At the end of its input it ends.
	strace -f -T -e trace=ioctl -o "$LOGS/strace" dpdk-testpmd --lcores 0@0,1@0 --file-prefix figures -a "$(card 1)" \
		-m $((gib * 1024)) --single-file-segments -- --total-num-mbufs=2048 </dev/null >"$LOGS/testpmd.log" 2>&1 ||
		fail "testpmd ended with $?: $(tail -n 1 "$LOGS/testpmd.log")"
	awk -F'[<>]' -v gib="$gib" '/VFIO_IOMMU_MAP_DMA.* = 0 </ { sum += $(NF - 1); calls++ }
		END { printf "%-10s %-16s %7s %9d ms   in %d calls of VFIO_IOMMU_MAP_DMA\n", "dpdk", "2 MiB, present", gib, sum * 1000, calls; exit !calls }' "$LOGS/strace" ||
		fail "testpmd mapped nothing"
}

"$RIG_TOOLS/map-time" --first - --second - --head
if [ "${1:-}" = books ]; then
	devices=(tap:figures0 tap:figures1)
	ours none sparse
	exit
fi
bind_to "$(card 1)" vfio-pci && bind_to "$(card 2)" vfio-pci || fail "cannot bind the cards to vfio-pci"
devices=("$(card 1)" "$(card 2)")
iommus=(type1)
[ ! -e /dev/iommu ] || iommus=(iommufd type1)
for iommu in "${iommus[@]}"; do ours "$iommu" sparse present; done
# Huge pages take memory from everybody else, so they come after.
hugepages $((largest * 512 + 64)) || fail "there are not $largest GiB of huge pages"
for iommu in "${iommus[@]}"; do ours "$iommu" huge; done
for gib in ${sizes//,/ }; do dpdk "$gib"; done
