# Memory comes to a running QEMU guest and goes again, while frames flow through our process and a card, on iommufd
# and on type1, each with a guest of its own.
#
#   peer's card ──frames──▶ card ──▶ guest ──the same frames──▶ card ──▶ peer's card: each one's contents checked
#
# First 256 MiB come online for the kernel: the guest's buffers move there by themselves. Then 256 MiB come as movable
# memory: the guest fills it with a file and serves that with sendfile, and the memory is taken out again. (Without
# checksum offload Linux copies what it sends to memory of its own, so those pages themselves are never the card's.)
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/vm.sh"

dimm_bytes=$((256 << 20)) file_mib=${RIG_FILE_MIB:-1}

claims() { "$RIG_TOOLS/map-claims" "$@"; }
stats_to() { stats --buffers >"$LOGS/$1.json"; }
memory_mib() { vm_run "awk '/MemTotal/ { print int(\$2 / 1024) }' /proc/meminfo"; }
memory_is() { [ "$(memory_mib)" -ge "$1" ]; }

# Checked frames from the peer to the guest and back, until traffic_stop.
traffic_start() {
	"$RIG_TOOLS/wire-check" through --from "$PEER" --to "$PEER" --dst $GUEST_MAC --tag 7 --until-term \
		--window 8 --size 1514 --idle-ms 20000 >"$LOGS/traffic-$1" 2>&1 &
	traffic=$!
	frames_seen=
	wait_for 120 "frames from the guest" frames_come_back
}
traffic_stop() {
	local status=0
	kill -TERM $traffic
	wait $traffic || status=$?
	cat "$LOGS/traffic-$1"
	return $status
}
# Whether so many frames more have come back from the guest.
frames_come_back() {
	local now
	now=$(cat "/sys/class/net/$PEER/statistics/rx_packets")
	: "${frames_seen:=$now}"
	[ "$now" -ge $((frames_seen + ${1:-20})) ]
}

# plug NAME : a DIMM on the monitor, until the guest has it.
plug() {
	local before
	before=$(memory_mib)
	vm_monitor "object_add memory-backend-memfd,id=m-$1,size=$dimm_bytes,share=on"
	vm_monitor "device_add pc-dimm,id=$1,memdev=m-$1"
	# The kernel's own tables for it come out of it.
	wait_for 60 "the guest to see $1" memory_is $((before + 240))
}

# What went wrong for want of the numbers is in the file; the claim's own words are the result.
plugged() { stats_to after && claims grown "$LOGS/before.json" "$LOGS/after.json" --port vm0 --bytes $dimm_bytes; }
used() { stats_to used && claims used "$LOGS/before.json" "$LOGS/used.json" --port vm0 --bytes $dimm_bytes; }
# The driver fills its ring again and again with the same pages. A socket that nobody reads keeps those that come to
# it, and new ones have to be taken, which the guest's kernel does from the new block.
buffers_come() {
	vm_run 'wire-check receive --iface eth0 --until-term >/dev/null & keeper=$!'
	vm_run 'until [ $(wc -l </proc/net/packet) -gt 2 ]; do usleep 100000; done; kill -STOP $keeper'
	wait_for 60 "buffers in the new memory" used
	used
	local status=$?
	vm_run 'kill -KILL $keeper; wait $keeper 2>/dev/null; :'
	return $status
}

movable_free() { vm_run "awk '/zone *Movable/ { found = 1 } found && /pages free/ { print \$3; exit }' /proc/zoneinfo"; }
# The guest's file in the new block, fetched over the wire: what it says of it, and what came.
serves_file() {
	local sum free
	free=$(movable_free)
	vm_run "head -c $((file_mib << 20)) /dev/urandom >/www/file" || return 1
	free=$((free - $(movable_free)))
	# Not all: some come from what the CPU had set aside before.
	[ $free -ge $((file_mib * 192)) ] || { echo "only $free pages of the movable block were taken" && return 1; }
	sum=$(vm_run "sha256sum </www/file")
	busybox wget -q -O "$RUN/fetched" "http://$GUEST_ADDRESS/file" || { echo "wget failed" && return 1; }
	[ "$(sha256sum <"$RUN/fetched")" = "$sum" ] || { echo "other contents came than $sum" && return 1; }
	echo "$file_mib MiB in $free pages of the new block, sent by sendfile, sha256 ${sum%% *}"
}

# unplug NAME: until QEMU has let go of it. Keeps the last statistics that still show it.
unplug() {
	local deadline=$((SECONDS + 120))
	vm_monitor "device_del $1"
	stats_to before
	until gone; do
		[ $SECONDS -lt $deadline ] || { echo "the guest does not give $1 back: $(tail -n 3 "$LOGS/guest.console" | tr '\r\n' '  ')" && return 1; }
		vm_is_gone && { echo "the guest ended" && return 1; }
		mv "$LOGS/after.json" "$LOGS/before.json"
	done
	vm_monitor "object_del m-$1"
	vm_monitor "info memory-devices"
	claims shrunk "$LOGS/before.json" "$LOGS/after.json" --port vm0 --bytes $dimm_bytes
}
gone() {
	stats_to after
	[ "$(mapped_bytes after)" -lt "$(mapped_bytes before)" ]
}
mapped_bytes() { grep -o '"mapped_bytes": *[0-9]*' "$LOGS/$1.json" | grep -o '[0-9]*$'; }

one_iommu() {
	local iommu=$1
	traffic_start "$iommu"
	stats_to before
	plug "$iommu-kernel"
	check "$iommu-plug" plugged
	check "$iommu-buffers-in-new-memory" buffers_come
	check "$iommu-plug-frames" traffic_stop "$iommu"
	cp "$LOGS/traffic-$iommu" "$LOGS/traffic-$iommu-plug"

	traffic_start "$iommu"
	vm_run "echo online_movable >/sys/devices/system/memory/auto_online_blocks"
	plug "$iommu-movable"
	check "$iommu-sendfile" serves_file
	check "$iommu-unplug" unplug "$iommu-movable"
	frames_seen=
	wait_for 60 "frames after the unplug" frames_come_back
	check "$iommu-unplug-frames" traffic_stop "$iommu"
}

# No guest's kernel gives memory back that a card has buffers in: a front-end of our own does.
drained() { "$RIG_TOOLS/unplug-under-dma" --socket "$SOCKET" --control "$CONTROL" --peer "$PEER"; }

bind_to "$(card 1)" vfio-pci
peer_up
ip addr add $PEER_ADDRESS/24 dev "$PEER"
vm_initramfs "$RIG_TOOLS/wire-check" <<END >"$RUN/guest.cpio.gz"
mkdir -p /www
mount -t tmpfs www /www
httpd -h /www
wire-check echo --iface eth0 --tag 7 --until-term --up-within-ms 86400000 --idle-ms 86400000 >/dev/null &
$VM_SHELL_INIT
END

guest_start() {
	VM_MEMORY=,slots=4,maxmem=2G VM_APPEND=memhp_default_state=online_kernel vm_start
	wait_for 450 "the guest to be up" vm_gone_or_says listens
	echo "rig: $SECONDS s: the guest is up"
}

iommus=(type1)
[ ! -e /dev/iommu ] || iommus=(iommufd type1)
for iommu in "${iommus[@]}"; do
	if ! backend_start "$(card 1)" --iommu "$iommu" --log debug; then
		not_ok "$iommu-start" "$(tail -n 1 "$LOGS/backend.log")"
		continue
	fi
	check "$iommu-unplug-under-dma" drained
	guest_start
	one_iommu "$iommu"
	check "$iommu-guest-powers-off" vm_powers_off eval "vm_is_gone || { vm_run 'poweroff -f'; false; }"
	check "$iommu-stop" backend_stop
	cp "$LOGS/backend.log" "$LOGS/backend-$iommu.log"
done
finish $((${#iommus[@]} * 9))
