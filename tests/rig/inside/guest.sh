# A QEMU guest beside our process, both inside the rig: pings the peer and moves a file both ways.
# RIG_GUEST is its kernel; RIG_GUEST.modules/ what a kernel with its drivers in modules has to load.
. "$(dirname "$0")/lib.sh"

there=10.9.0.2 guest=10.9.0.1 file_kib=${RIG_FILE_KIB:-2048}

# The guest: busybox and one program.
guest_initramfs() {
	local tree=$RUN/guest
	mkdir -p "$tree"/{bin,proc,sys,dev,modules}
	cp "$(type -P busybox)" "$tree/bin/busybox"
	[ ! -d "$RIG_GUEST.modules" ] || cp "$RIG_GUEST.modules"/*.ko "$tree/modules/"
	cat >"$tree/init" <<-END
		#!/bin/busybox sh
		/bin/busybox --install -s /bin
		mount -t proc proc /proc
		mount -t sysfs sys /sys
		mount -t devtmpfs dev /dev
		for module in /modules/*.ko; do [ -e "\$module" ] && insmod "\$module"; done
		until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
		ip link set eth0 up
		ip addr add $guest/24 dev eth0
		echo "guest: up after \$(cut -d' ' -f1 /proc/uptime) s"
		ping -c 10 -i 0.2 -W 5 $there >/ping
		echo "guest: ping \$(grep -o '.*packet loss' /ping); \$(tail -n 1 /ping)"
		nc $there 7001 >/file
		echo "guest: got \$(sha256sum </file)"
		nc $there 7002 </file
		echo "guest: sent \$(sha256sum </file)"
		echo "guest: done"
		nc -l -p 7003 >/dev/null
		poweroff -f
	END
	chmod +x "$tree/init"
	(cd "$tree" && find . | cpio -o -H newc --quiet | gzip -1)
}

guest_says() { grep -q "^guest: $1" "$LOGS/guest.console"; }
# A serial console ends its lines with a carriage return too.
told() { grep -m 1 "^guest: $1" "$LOGS/guest.console" | tr -d '\r' | cut -d' ' -f3-; }

bind_to "$(card 1)" vfio-pci
peer_up
ip addr add $there/24 dev "$PEER"
iommu=type1
[ ! -e /dev/iommu ] || iommu=iommufd
guest_initramfs >"$RUN/guest.cpio.gz"
head -c ${file_kib}K /dev/urandom >"$RUN/file"
sum=$(sha256sum <"$RUN/file")
busybox nc -l -p 7001 <"$RUN/file" >/dev/null &
# Its standard input stays open: at its end nc would close its side, and the guest's would stop sending.
busybox nc -l -p 7002 >"$RUN/back" < <(sleep 3600) &
receiver=$!

if ! backend_start "$(card 1)" --iommu "$iommu"; then
	not_ok guest-backend "$(tail -n 1 "$LOGS/backend.log")"
	finish 6
fi
: >"$LOGS/guest.console" # not to read an earlier guest's words
qemu-system-x86_64 -machine q35,memory-backend=ram -accel tcg -cpu max -smp 1 -m 256M \
	-object memory-backend-memfd,id=ram,size=256M,share=on \
	-chardev "socket,id=port,path=$SOCKET" -netdev vhost-user,id=net,chardev=port \
	-device "virtio-net-pci,netdev=net,mac=$GUEST_MAC,romfile=" \
	-kernel "$RIG_GUEST" -initrd "$RUN/guest.cpio.gz" -append "console=ttyS0 quiet panic=-1" \
	-nodefaults -display none -no-reboot -serial "file:$LOGS/guest.console" -monitor "unix:$RUN/monitor.sock,server=on,wait=off" \
	>"$LOGS/guest-qemu.log" 2>&1 &
vmm=$!
gone_or() { ! kill -0 $vmm || guest_says "$1"; }
for milestone in up ping got sent; do
	wait_for 300 "the guest to say $milestone" gone_or $milestone
	echo "rig: $SECONDS s: guest: $milestone $(told $milestone)"
done
ping_all() { told ping && grep -q "^guest: ping 10 packets transmitted, 10 packets received" "$LOGS/guest.console"; }
same_sum() {
	if [ "$1" = "$sum" ]; then
		echo "$file_kib KiB, sha256 ${sum%% *}"
	else
		echo "sha256 ${1%% *} of what came, ${sum%% *} of what was sent"
		return 1
	fi
}
check guest-ping ping_all
check guest-receives same_sum "$(told got)"
wait_for 20 "the file to be back" eval "! kill -0 $receiver"
check guest-sends same_sum "$(sha256sum <"$RUN/back")"
check guest-zero-copy stats_show --iommu "$iommu" --at-least 500
# It waits for a connection to power off, and may not be listening yet.
powered_off_or_asked() {
	! kill -0 $vmm && return
	echo | busybox nc -w 2 $guest 7003
	return 1
}
powers_off() {
	if ! wait_for 90 "the guest to power off" powered_off_or_asked; then
		kill -KILL $vmm
		echo "it did not"
		return 1
	fi
	wait $vmm && echo "QEMU ended with 0"
}
check guest-powers-off powers_off
check guest-stop backend_stop
finish 6
