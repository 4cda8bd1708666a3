# The front-end in a container that shares nothing with the host but the folder of the socket.
#
# usage: container.sh            the test
#        container.sh enter NEW  run by the test inside the fresh namespaces: makes the container's root, and goes there
if [ "${1:-}" = enter ]; then
	set -e
	new=$2
	shift 2
	mount -t tmpfs -o mode=755 container "$new"
	mkdir -p "$new"/{usr,etc,proc,sys,dev,tmp,run,sockets,old,var}
	mount --rbind /usr "$new/usr"
	for link in bin sbin lib lib64; do
		[ ! -L /$link ] || cp -P /$link "$new/"
	done
	ln -s ../run "$new/var/run"
	cp /etc/ld.so.cache "$new/etc/"
	[ ! -d /etc/alternatives ] || cp -r /etc/alternatives "$new/etc/"
	mount -t proc proc "$new/proc"
	mount -t sysfs sys "$new/sys"
	for node in null zero urandom; do
		: >"$new/dev/$node"
		mount --bind /dev/$node "$new/dev/$node"
	done
	mount --bind "$SOCKETS" "$new/sockets"
	cd "$new"
	pivot_root . old
	umount -l /old
	until [ -e /sys/class/net/guest0w ]; do sleep 0.1; done
	ip link set guest0w up promisc on
	exec "$@"
fi

. "$(dirname "$0")/lib.sh"

bind_to "$(card 1)" vfio-pci
peer_up
mkdir -p /run/container
export SOCKETS
SOCKETS=$(dirname "$SOCKET")
iommu=type1
[ ! -e /dev/iommu ] || iommu=iommufd
if backend_start "$(card 1)" --iommu "$iommu"; then
	FRONT_END_AS="unshare --user --map-root-user --mount --pid --fork --kill-child --net --ipc --uts bash $0 enter /run/container"
	outside=$SOCKET
	SOCKET=/sockets/vm0.sock # as it is called inside
	front_end_start --no-huge -m 64
	SOCKET=$outside
	own_network() { [ "$(readlink "/proc/$FRONT_END/ns/net")" != "$(readlink /proc/self/ns/net)" ]; }
	wait_for 20 "the container's network" own_network
	ip link set guest0w netns $FRONT_END
	check container-tx-64 tx --count 3000 --size 64
	check container-tx-1514 tx --count 3000 --size 1514
	check container-rx-64 rx --count 3000 --size 64
	check container-rx-1514 rx --count 3000 --size 1514
	check container-zero-copy stats_show --iommu "$iommu" --at-least 6000
	apart() {
		local kind shared=()
		# A pid namespace is for the children of the process that makes it.
		for kind in user mnt pid_for_children net ipc uts; do
			[ "$(readlink "/proc/$FRONT_END/ns/$kind")" != "$(readlink "/proc/self/ns/$kind")" ] || shared+=($kind)
		done
		echo "namespaces shared with the host: ${shared[*]:-none}"
		[ ${#shared[@]} = 0 ]
	}
	check container-apart apart
	# As a container ends at the latest; unshare lets no other signal through, and bash need not tell of it.
	{ kill -KILL $FRONT_END && wait $FRONT_END || :; } 2>/dev/null
	check container-stop backend_stop
else
	not_ok container-start "$(tail -n 1 "$LOGS/backend.log")"
fi
finish 7
