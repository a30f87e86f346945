# Every command a person types. `make run` and `make test` do all set-up by themselves and reuse what is built.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup setup-build kernel kernel-debug rootfs images product build check run test test-unit test-node test-compat test-docker test-hostile fuzz \
	node soak-boot soak-pods bench bench-gate bench-record bench-boot install clean

# N: boots of `make soak-boot`. FILTER: which tests of `make test-node` and `make test-compat` run (a part of their names).
# GROUPS: which groups `make bench` measures. COUNTS=1: `make bench-gate` compares counts alone.
# FUZZ_SECONDS, TARGET: how long `make fuzz` runs each target, and which one. PREFIX, DESTDIR: where `make install` puts things.
N ?= 100
FILTER ?=
GROUPS ?=
COUNTS ?=
FUZZ_SECONDS ?=
TARGET ?=
PREFIX ?= /usr/local
DESTDIR ?=

NODE := tests/node/node
# Of the tree that is measured.
REVISION = $(shell git describe --always --dirty --abbrev=12)

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install Debian packages and virtme-ng, if anything is missing (root)
	@tests/node/setup

setup-build: ## the same, but only what `make install` needs
	@tests/node/setup build

kernel: setup-build ## build/vmlinux, the guest kernel
	@guest-kernel/build

kernel-debug: setup-build ## build/vmlinux-debug, with a serial console
	@guest-kernel/build debug

rootfs: setup-build ## build/initramfs.cpio, the guest image
	@rootfs/build agent
	@rootfs/build reboot

images: build/images/.stamp ## build/images, the test images

build/images/.stamp: $(wildcard tests/node/images/*) | setup
	@echo "test images: building them from installed packages"
	@rm -rf build/images && tests/node/images/build build/images && touch $@

product: kernel rootfs ## what `make install` installs, and nothing that only tests need
	@tools/build product

build: setup kernel rootfs images ## everything: binaries in build/bin, guest kernel, guest image, test images
	@tools/build

check: setup-build ## format, clippy, licences, circles of imports, documents that are generated
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo clippy -p bulkhead-e2e --test node --locked -- -D warnings
	tools/licences
	tools/circles --self-test
	tools/circles
	tools/bench --self-test
	tools/bench check

run: build ## start a node and a pod in its own guest, and show both side by side
	@$(NODE) run bulkhead run

test: build ## every test but test-compat, test-docker and the lying agents of test-hostile: unit, VMM, guest image, fuzz seeds, end to end, counts
	@tools/test unit rootfs fuzz node containerd-2 $(if $(wildcard benches/recorded.json),counts)

test-unit: setup ## unit tests, and VMM tests on /dev/kvm
	@tools/test unit

test-node: build ## the end-to-end suites in a node (FILTER=part of a test's name; CONTAINERD=1.7 or 2)
	@FILTER='$(FILTER)' tools/test node

test-compat: build ## pods on runc and on Bulkhead compared, case by case (FILTER=part of a name)
	@FILTER='$(FILTER)' tools/test compat

test-docker: build ## containers and networks of the real Docker, in guests
	@tools/test docker

test-hostile: build ## tests that play a hostile guest or a failing part, counted by boundary (FUZZ_SECONDS=n: fuzz targets too)
	@FUZZ_SECONDS='$(FUZZ_SECONDS)' tools/hostile

fuzz: setup ## every fuzz target for FUZZ_SECONDS=60 (TARGET=name: one of them)
	@FUZZ_SECONDS='$(FUZZ_SECONDS)' tools/fuzz run $(TARGET)

node: build ## a shell in the test node
	@$(NODE) shell

soak-boot: build ## N=100 guest boots in a row, none may hang
	@$(NODE) run benches/soak-boot $(N)

soak-pods: build ## 200 containers one after the other and 20 pods at once: nothing left, nothing grows
	@$(NODE) run bulkhead-soak

bench: build ## pods beside runc's: files, programs, network, streams, starts (GROUPS="files network"); a table and build/bench.json
	@$(NODE) run bulkhead-bench --json build/bench.json --revision '$(REVISION)' $(GROUPS)

bench-gate: build ## fails if pods cost more than benches/recorded.json says (COUNTS=1: counts alone, which is quick)
	@$(NODE) run bulkhead-bench $(if $(COUNTS),--counts) --json build/bench-gate.json --revision '$(REVISION)'
	@tools/bench gate build/bench-gate.json benches/recorded.json

bench-record: ## takes build/bench.json as what is compared with from now on, and writes docs/performance.md
	@tools/bench record build/bench.json

bench-boot: build ## boot time against QEMU's microvm, and time to a pod's first line of output against runc's
	@$(NODE) run bulkhead-bench start
	@$(NODE) run benches/boot

install: product ## binaries, guest kernel and image below PREFIX (/usr/local), configuration in /etc/bulkhead
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(PREFIX)/lib/bulkhead' '$(DESTDIR)/etc/bulkhead'
	install -m 755 build/bin/containerd-shim-bulkhead-v2 build/bin/bulkhead '$(DESTDIR)$(PREFIX)/bin'
	install -m 755 build/bin/bulkhead-vmm '$(DESTDIR)$(PREFIX)/lib/bulkhead'
	install -m 644 build/vmlinux build/initramfs.cpio '$(DESTDIR)$(PREFIX)/lib/bulkhead'
	[ -e '$(DESTDIR)/etc/bulkhead/config.toml' ] || \
		sed 's|/usr/local|$(PREFIX)|' deploy/config.toml >'$(DESTDIR)/etc/bulkhead/config.toml'

clean: ## remove build/ and what cargo has built; packages stay
	@$(NODE) down
	rm -rf build target fuzz/target
