# The commands of the project. What they do is in tests/rig; none of them asks a question.
.PHONY: help build demo demo-guest test bench-map bench-peers bench-latency bench-instructions setup clean-rig
.DEFAULT_GOAL := help

help: ## say what there is
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

build: ## the release binary, target/release/vhost-user-vfio
	cargo build --release --package backend

demo: ## frames through a guest's queues, our process, an IOMMU and a card, emulated here; TAP=1: without a card
	@tests/rig/demo $(if $(TAP),tap,card)

demo-guest: ## the same with a QEMU guest
	@tests/rig/demo guest

test: ## everything: format, lints, tests, and the rig with a real vfio-pci device
	@tests/rig/everything

bench-map: ## how long it takes to map a guest's memory, beside DPDK; GIB=1,8: how much of it
	@tests/rig/figures $(GIB)

bench-peers: ## what a frame costs beside DPDK, by size and direction; SIZES=64 DIRECTIONS=rx ROUNDS=3: less of it
	@tests/rig/peers

bench-latency: ## how long a frame takes there and back, beside DPDK, and what idling costs; WHERE=tap or WHERE=rig: one of them
	@tests/rig/latency $(WHERE)

bench-instructions: ## what a pass of each lane costs in instructions, beside the same work without checks
	@tests/rig/instructions

setup: ## install what demo and test need (as root; else says what to type)
	@tests/rig/setup rig

clean-rig: ## forget downloaded and built kernels and package lists
	rm -rf .cache
