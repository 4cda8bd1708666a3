# A QEMU guest inside the rig: what it runs, how it is started, how it is talked to. Sourced after lib.sh.
# RIG_GUEST is its kernel; RIG_GUEST.modules/ what a kernel with its drivers in modules has to load.
#
# The guest has three wires to us, none of them the network under test: its console (a file), a shell (`vm_run`),
# and QEMU's monitor (`vm_monitor`).

GUEST_ADDRESS=10.9.0.1 PEER_ADDRESS=10.9.0.2

# Prints the guest's initramfs: busybox, these programs with the libraries they load, and an init that mounts what
# is usual, waits for eth0 and then does what is on standard input.
vm_initramfs() {
	local tree=$RUN/guest program library
	rm -rf "$tree"
	mkdir -p "$tree"/{bin,proc,sys,dev,tmp,modules}
	cp "$(type -P busybox)" "$tree/bin/busybox"
	[ ! -d "$RIG_GUEST.modules" ] || cp "$RIG_GUEST.modules"/*.ko "$tree/modules/"
	for program; do
		cp "$program" "$tree/bin/"
		for library in $(ldd "$program" | grep -o '/[^ ]*'); do
			mkdir -p "$tree$(dirname "$library")"
			cp -Ln "$library" "$tree$library"
		done
	done
	{
		cat <<-END
			#!/bin/busybox sh
			/bin/busybox --install -s /bin
			mount -t proc proc /proc
			mount -t sysfs sys /sys
			mount -t devtmpfs dev /dev
			for module in /modules/*.ko; do [ -e "\$module" ] && insmod "\$module"; done
			until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
			ip link set eth0 up
			ip addr add $GUEST_ADDRESS/24 dev eth0
			echo "guest: up after \$(cut -d' ' -f1 /proc/uptime) s"
		END
		cat
	} >"$tree/init"
	chmod +x "$tree/init"
	(cd "$tree" && find . | cpio -o -H newc --quiet | gzip -1)
}

# Starts the guest with 256 MiB, a first NIC on $SOCKET and further QEMU arguments; VM_APPEND is more for its
# kernel's command line, VM_MEMORY more for QEMU's -m. Sets VMM.
vm_start() {
	: >"$LOGS/guest.console" # not to read an earlier guest's words
	rm -f "$RUN"/{shell,monitor}.{in,out}
	mkfifo "$RUN"/{shell,monitor}.{in,out}
	qemu-system-x86_64 -machine q35,memory-backend=ram -accel tcg -cpu max -smp 1 -m "256M${VM_MEMORY:-}" \
		-object memory-backend-memfd,id=ram,size=256M,share=on \
		-chardev "socket,id=port,path=$SOCKET${VM_SOCKET_OPTIONS:-}" -netdev vhost-user,id=net,chardev=port \
		-device "virtio-net-pci,netdev=net,mac=$GUEST_MAC,romfile=" \
		-kernel "$RIG_GUEST" -initrd "$RUN/guest.cpio.gz" -append "console=ttyS0 quiet panic=-1 ${VM_APPEND:-}" \
		-nodefaults -display none -no-reboot -serial "file:$LOGS/guest.console" -serial "pipe:$RUN/shell" \
		-monitor "pipe:$RUN/monitor" "$@" >"$LOGS/guest-qemu.log" 2>&1 &
	VMM=$!
	# Held open, for the other ends not to see an end of file between two commands.
	exec {VM_SHELL}<>"$RUN/shell.in" {VM_MONITOR}<>"$RUN/monitor.in"
	cat "$RUN/shell.out" >"$LOGS/guest.shell" &
	cat "$RUN/monitor.out" >"$LOGS/guest.monitor" &
}

vm_is_gone() { ! kill -0 $VMM 2>/dev/null; }
vm_says() { grep -q "^guest: $1" "$LOGS/guest.console"; }
# A serial console ends its lines with a carriage return too.
vm_told() { grep -m 1 "^guest: $1" "$LOGS/guest.console" | tr -d '\r' | cut -d' ' -f3-; }
vm_gone_or_says() { vm_is_gone || vm_says "$1"; }

# What an init ends with whose guest is commanded from here: a line at a time from the second serial port. The port is opened
# first and stays so, since one that nobody has open loses what is sent to it.
VM_SHELL_INIT='exec </dev/ttyS1 >/dev/ttyS1 2>&1; stty raw -echo; echo "guest: listens" >/dev/console; while read -r line; do eval "$line" </dev/null; done'

# Runs a line in the guest's shell, prints what it prints and has its status. A guest that does not answer is a failure.
vm_run() {
	local mark=end-$BASHPID-$RANDOM from
	from=$(stat -c %s "$LOGS/guest.shell")
	printf '%s; echo "%s $?"\n' "$*" $mark >&$VM_SHELL
	vm_answered() { vm_is_gone || grep -q "^$mark [0-9]" "$LOGS/guest.shell"; }
	wait_for 120 "the guest to have run: $*" vm_answered || return 1
	tail -c +$((from + 1)) "$LOGS/guest.shell" | tr -d '\r' | sed "/^$mark /,\$d"
	grep -q "^$mark 0" "$LOGS/guest.shell"
}

vm_monitor() { echo "$*" >&$VM_MONITOR; }

# Powers the guest off, and says what QEMU ended with. With the name of a function that makes it: until it is done.
vm_powers_off() {
	local status=0
	if ! wait_for 90 "the guest to power off" "$@"; then
		kill -KILL $VMM
		echo "it did not"
		return 1
	fi
	wait $VMM || status=$?
	echo "QEMU ended with $status"
	return $status
}
