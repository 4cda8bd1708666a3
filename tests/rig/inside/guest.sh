# A QEMU guest beside our process, both inside the rig: pings the peer and moves a file both ways.
. "$(dirname "$0")/lib.sh"
. "$(dirname "$0")/vm.sh"

file_kib=${RIG_FILE_KIB:-2048}

bind_to "$(card 1)" vfio-pci
peer_up
ip addr add $PEER_ADDRESS/24 dev "$PEER"
iommu=type1
[ ! -e /dev/iommu ] || iommu=iommufd
vm_initramfs <<-END >"$RUN/guest.cpio.gz"
	ping -c 10 -i 0.2 -W 5 $PEER_ADDRESS >/ping
	echo "guest: ping \$(grep -o '.*packet loss' /ping); \$(tail -n 1 /ping)"
	nc $PEER_ADDRESS 7001 >/file
	echo "guest: got \$(sha256sum </file)"
	nc $PEER_ADDRESS 7002 </file
	echo "guest: sent \$(sha256sum </file)"
	echo "guest: done"
	nc -l -p 7003 >/dev/null
	poweroff -f
END
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
vm_start
for milestone in up ping got sent; do
	wait_for 300 "the guest to say $milestone" vm_gone_or_says $milestone
	echo "rig: $SECONDS s: guest: $milestone $(vm_told $milestone)"
done
ping_all() { vm_told ping && grep -q "^guest: ping 10 packets transmitted, 10 packets received" "$LOGS/guest.console"; }
same_sum() {
	if [ "$1" = "$sum" ]; then
		echo "$file_kib KiB, sha256 ${sum%% *}"
	else
		echo "sha256 ${1%% *} of what came, ${sum%% *} of what was sent"
		return 1
	fi
}
check guest-ping ping_all
check guest-receives same_sum "$(vm_told got)"
wait_for 20 "the file to be back" eval "! kill -0 $receiver"
check guest-sends same_sum "$(sha256sum <"$RUN/back")"
check guest-zero-copy stats_show --iommu "$iommu" --at-least 500
# It waits for a connection to power off, and may not be listening yet.
powered_off_or_asked() {
	vm_is_gone && return
	echo | busybox nc -w 2 $GUEST_ADDRESS 7003
	return 1
}
check guest-powers-off vm_powers_off powered_off_or_asked
check guest-stop backend_stop
finish 6
