# Two ports on two cards and one map, the third card the peer: the first port's card comes and goes, by the operator's
# word and by the host's, while frames flow. The second port loses none.
. "$(dirname "$0")/lib.sh"

first=$(card 1) second=$(card 2)
sockets=("$SOCKET" "$RUN/vuv/vm1.sock") macs=("$GUEST_MAC" 52:54:00:00:00:02)

start() {
	rm -f "${sockets[@]}"
	cat >"$RUN/config.toml" <<-END
		control = "$CONTROL"
		[map.main]
		iommu = "$1"
		[port.vm0]
		device = "$first"
		socket-path = "${sockets[0]}"
		[port.vm1]
		device = "$second"
		socket-path = "${sockets[1]}"
	END
	backend_start_with "$RUN/config.toml"
}

# as_guest N COMMAND..: with the front-end's names of guest N.
as_guest() {
	local SOCKET=${sockets[$1]} GUEST_MAC=${macs[$1]} FRONT_END_VETH=guest$1
	shift
	"$@"
}

# port_is N WORDS: whether `stats` shows port N so, in its own words: "connected", "device", "link". No interpreter is
# started for it, which takes seconds here.
port_is() {
	stats_words | grep -o '"connected":[a-z]*,"device":"[^"]*"\|"link":"[a-z]*"' | paste -sd ',\n' |
		sed -n "$1p" | grep -qF "$2"
}
stats_words() { stats | tr -d ' \n'; }

frames() { as_guest "$1" both_ways --count 500 --size 1514 --window 16 --idle-ms 20000; }

# Frames both ways through guest 1, until told to end; every one has to come through.
traffic_start() {
	local wire_check=("$RIG_TOOLS/wire-check" through --until-term --size 1514 --window 16 --idle-ms 20000)
	"${wire_check[@]}" --from guest1 --to "$PEER" >"$RUN/traffic-tx" 2>&1 &
	traffic=($!)
	"${wire_check[@]}" --from "$PEER" --to guest1 --dst "${macs[1]}" >"$RUN/traffic-rx" 2>&1 &
	traffic+=($!)
	wait_for 10 "traffic" frames_move
}
traffic_end() {
	local status=0 job
	for job in "${traffic[@]}"; do kill -0 "$job" || { echo "the traffic ended before its time" && status=1; }; done
	kill -TERM "${traffic[@]}"
	for job in "${traffic[@]}"; do wait "$job" || status=1; done
	# Who lost them: the card and we by `stats`, the front-end and the wire's ends by their interfaces.
	[ $status = 0 ] || { stats && ip -s link; } >"$LOGS/lost-after-$SECONDS-s.log"
	echo "$(cat "$RUN/traffic-tx"); $(cat "$RUN/traffic-rx")"
	return $status
}

# Nobody holds the card: its driver lets go of it at once, and takes it again.
detach() {
	"$PROGRAM" device detach "$first" --control "$CONTROL" || return 1
	port_is 1 '"connected":true,"device":"none"' || { echo "vm0 is not without a device" && return 1; }
	driver_lets_go 20 || { echo "something still holds $first" && return 1; }
	bind_to "$first" vfio-pci
	echo "$first is free, vm0 has no device and its front-end"
}
# Takes the card from its driver, which waits for whoever uses it, at most so many seconds.
driver_lets_go() { timeout "$1" bash -c 'echo "$1" >"/sys/bus/pci/devices/$1/driver/unbind"' unbind "$first"; }

attach() {
	"$PROGRAM" device attach "$first" --port vm0 --control "$CONTROL" || return 1
	wait_for 30 "the link of $first" port_is 1 "\"connected\":true,\"device\":\"$first\",\"link\":\"up\"" || return 1
	frames 0
}

# The host takes the card, with frames in it: it waits until it has it.
unbind() {
	local job begun
	# A small window, since every frame of the wire comes to guest 1 too, whose sockets are only so long.
	"$RIG_TOOLS/wire-check" through --from guest0 --to "$PEER" --seconds 600 --window 4 --idle-ms 1000 >/dev/null 2>&1 &
	job=$!
	wait_for 10 "frames on $first" card_sends
	begun=$(date +%s%N)
	driver_lets_go 60 || { echo "unbind does not return" && return 1; }
	begun=$((($(date +%s%N) - begun) / 1000000))
	kill "$job" 2>/dev/null || :
	wait "$job" 2>/dev/null || :
	[ ! -e "/sys/bus/pci/devices/$first/driver" ] || { echo "$first still has a driver" && return 1; }
	port_is 1 '"connected":true,"device":"none"' || { echo "vm0 is not without a device" && return 1; }
	grep -q "the host wants the device back.*$first" "$LOGS/backend.log" || { echo "nothing in the log" && return 1; }
	echo "unbind of $first returned after $begun ms, vm0 has no device and its front-end"
}
sent_by_first() { stats_words | grep -oP '"direction":"tx".*?"frames":\K[0-9]+' | head -n 1; }
card_sends() {
	local before=${sent:-}
	sent=$(sent_by_first)
	[ -n "$before" ] && [ "$sent" -gt "$before" ]
}

one_iommu() {
	local iommu=$1
	if ! start "$iommu"; then
		not_ok "$iommu-devices-start" "$(tail -n 1 "$LOGS/backend.log")"
		return
	fi
	as_guest 0 front_end_start --single-file-segments -m 64
	front_ends=("$FRONT_END")
	as_guest 1 front_end_start --single-file-segments -m 64
	front_ends+=("$FRONT_END")
	check "$iommu-devices-frames" frames 0
	traffic_start
	check "$iommu-detach" detach
	check "$iommu-attach-again" attach
	check "$iommu-detach-second-loses-nothing" traffic_end
	traffic_start
	check "$iommu-unbind" unbind
	check "$iommu-unbind-second-loses-nothing" traffic_end
	bind_to "$first" vfio-pci
	check "$iommu-attach-after-unbind" attach
	for FRONT_END in "${front_ends[@]}"; do front_end_stop; done
	check "$iommu-devices-stop" backend_stop
	cp "$LOGS/backend.log" "$LOGS/backend-$iommu.log"
}

hugepages 200
bind_to "$first" vfio-pci
bind_to "$second" vfio-pci
peer_up
iommus=(type1)
[ ! -e /dev/iommu ] || iommus=(iommufd type1)
for iommu in "${iommus[@]}"; do one_iommu "$iommu"; done
finish $((${#iommus[@]} * 8))
