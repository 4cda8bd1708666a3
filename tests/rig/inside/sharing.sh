# One map, two cards, three cases, on iommufd and on type1:
#
# - two virtio-user front-ends whose guest addresses are the same numbers, in huge pages: each has memory of its own;
# - a QEMU guest with two NICs, over two sockets: its memory is mapped and pinned once;
# - the same guest, whose VMM takes pages away from it by its balloon: that is noticed, and mended.
#
# Wants three cards: two for vfio-pci, and the peer. The guest stays, our process is started anew under it.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/vm.sh"

guest_bytes=$((256 << 20))
sockets=("$SOCKET" "$RUN/vuv/vm1.sock") macs=("$GUEST_MAC" 52:54:00:00:00:02)

claims() { "$RIG_TOOLS/map-claims" "$@"; }
stats_to() { stats >"$LOGS/$1.json"; }

# Two ports on one map.
configure() {
	cat <<-END
		control = "$CONTROL"
		[map.main]
		iommu = "$1"
		[port.vm0]
		device = "$(card 1)"
		socket-path = "${sockets[0]}"
		[port.vm1]
		device = "$(card 2)"
		socket-path = "${sockets[1]}"
	END
}
start() {
	configure "$1" >"$RUN/config.toml"
	rm -f "${sockets[@]}"
	backend_start_with "$RUN/config.toml"
}

# two_at_once COMMAND..: runs it for both guests at once; fails if one does.
two_at_once() {
	local status=0 which jobs=() seen
	for which in 0 1; do
		FRONT_END_VETH=guest$which GUEST_MAC=${macs[which]} "$@" $which >"$RUN/seen-$which" 2>&1 &
		jobs+=($!)
	done
	for which in "${jobs[@]}"; do wait $which || status=1; done
	seen="$(cat "$RUN/seen-0"); $(cat "$RUN/seen-1")"
	[ $status = 0 ] || seen+="; $(what_came)"
	echo "$seen" | tr '\n' ' '
	return $status
}
# For a failure: how far frames came in our process, and in a guest.
what_came() {
	stats_to failed
	"$RIG_TOOLS/picture" "$LOGS/failed.json" >"$LOGS/failed.picture" 2>&1 || :
	grep -h -E '^ *vm[01]' "$LOGS/failed.picture" | tr -s ' ' | tr '\n' ';'
	[ -z "${VMM:-}" ] || vm_run "grep -h eth /proc/net/dev /proc/net/packet" | tr -s ' ' | tr '\n' ';'
}

# ---- two front-ends with equal addresses ----------------------------------------------------------------------

veth_both_ways() { both_ways --count 2000 --size 1514 --window 16; }

# Without randomisation, and told where to put its memory, one is where the other is. ($1: which)
container_start() {
	SOCKET=${sockets[$1]} GUEST_MAC=${macs[$1]} FRONT_END_VETH=guest$1 FRONT_END_AS="setarch -R" \
		front_end_start --single-file-segments -m 64 --base-virtaddr=0x100000000
	containers[$1]=$FRONT_END
}

equal_addresses() {
	local iommu=$1
	if ! start "$iommu"; then
		not_ok "$iommu-equal-start" "$(tail -n 1 "$LOGS/backend.log")"
		return
	fi
	container_start 0
	container_start 1
	check "$iommu-equal-frames" two_at_once veth_both_ways
	stats_to "$iommu-equal"
	check "$iommu-equal-addresses" claims equal-guests "$LOGS/$iommu-equal.json" --ports vm0,vm1
	check "$iommu-huge-pages" claims page-size "$LOGS/$iommu-equal.json" --ports vm0,vm1 --size 2M
	for FRONT_END in "${containers[@]}"; do front_end_stop; done
	check "$iommu-equal-stop" backend_stop
	cp "$LOGS/backend.log" "$LOGS/backend-$iommu-equal.log"
}

# ---- one guest, two NICs --------------------------------------------------------------------------------------

# Frames from the peer to one of the guest's NICs and back, each one's contents checked. ($1: which)
echoed() {
	"$RIG_TOOLS/wire-check" through --from "$PEER" --to "$PEER" --dst "${macs[$1]}" --tag $((7 + $1)) \
		--count 500 --window 8 --size 1514 --idle-ms 20000
}

pinned_once() {
	local field=VmPin
	[ "$1" = iommufd ] || field=VmLck
	stats_to "$1-shared"
	local seen
	seen=$(claims pinned-once "$LOGS/$1-shared.json" --ports vm0,vm1 --bytes $guest_bytes) || { echo "$seen" && return 1; }
	echo "$seen; the kernel says $(grep $field /proc/$BACKEND/status | tr -s '\t ' ' ')"
}

# The balloon takes half of the guest's memory, is noticed, and gives it back.
balloon() {
	stats_to before
	vm_monitor "balloon 128"
	noticed() { stats_to after && claims discarded "$LOGS/before.json" "$LOGS/after.json"; }
	wait_for 90 "the discarded pages to be noticed" noticed || { noticed; return 1; }
	grep -m 1 -i 'WARN.*discard' "$LOGS/backend.log" || { echo "no warning in the log" && return 1; }
	vm_monitor "balloon 256"
	balloon_is_back() { vm_run "awk '/MemAvailable/ { exit \$2 < 180000 }' /proc/meminfo"; }
	wait_for 120 "the guest to have its memory back" balloon_is_back || { echo "the balloon stays" && return 1; }
	noticed
}
# The guest uses what it got back, and frames come and go as before.
frames_after_balloon() {
	vm_run "dd if=/dev/zero of=/tmp/fill bs=1M count=60 2>/dev/null && rm /tmp/fill" || { echo "the guest cannot use its memory" && return 1; }
	two_at_once echoed
}

two_nics() {
	local iommu=$1
	if ! start "$iommu"; then
		not_ok "$iommu-shared-start" "$(tail -n 1 "$LOGS/backend.log")"
		return
	fi
	[ -n "${VMM:-}" ] || guest_start
	check "$iommu-shared-frames" two_at_once echoed
	check "$iommu-pinned-once" pinned_once "$iommu"
	check "$iommu-balloon-noticed" balloon
	check "$iommu-balloon-frames" frames_after_balloon
	check "$iommu-shared-stop" backend_stop
	cp "$LOGS/backend.log" "$LOGS/backend-$iommu-shared.log"
}

guest_start() {
	vm_initramfs "$RIG_TOOLS/wire-check" <<-END >"$RUN/guest.cpio.gz"
		mount -t tmpfs -o size=80% tmp /tmp
		until [ -e /sys/class/net/eth1 ]; do sleep 0.1; done
		ip link set eth1 up
		for which in 0 1; do
			wire-check echo --iface eth\$which --tag \$((7 + which)) --until-term --up-within-ms 86400000 --idle-ms 86400000 >/dev/null &
		done
		until [ \$(wc -l </proc/net/packet) -gt 2 ]; do sleep 0.1; done
		$VM_SHELL_INIT
	END
	VM_SOCKET_OPTIONS=,reconnect-ms=200 vm_start \
		-chardev "socket,id=port1,path=${sockets[1]},reconnect-ms=200" -netdev vhost-user,id=net1,chardev=port1 \
		-device "virtio-net-pci,netdev=net1,mac=${macs[1]},romfile=" -device virtio-balloon-pci
	wait_for 450 "the guest to be up" vm_gone_or_says listens
	echo "rig: $SECONDS s: the guest is up"
}

hugepages 200
bind_to "$(card 1)" vfio-pci
bind_to "$(card 2)" vfio-pci
peer_up
iommus=(type1)
[ ! -e /dev/iommu ] || iommus=(iommufd type1)
for iommu in "${iommus[@]}"; do equal_addresses "$iommu"; done
for iommu in "${iommus[@]}"; do two_nics "$iommu"; done
check sharing-guest-powers-off vm_powers_off eval "vm_is_gone || { vm_run 'poweroff -f'; false; }"
finish $((${#iommus[@]} * 9 + 1))
