# SPDX-License-Identifier: GPL-2.0-or-later
# `make help` says what there is. Every target first installs what is missing.

VENV ?= .venv
CMD ?=
KERNEL ?= 6.1
MODULES ?=
APPEND ?=
SMP ?= 2
MEM ?= 1G
ACCEL ?= auto
DISKS ?=
NET ?=
DEVICE ?=
QEMU ?=
TIMEOUT ?= 300
ARGS ?=

# As the user wrote them: without $(value), make would expand the dollars of a shell command.
export RUN_VM_CMD = $(value CMD)
export RUN_VM_APPEND = $(value APPEND)
export RUN_VM_DISKS = $(value DISKS)
export RUN_VM_NET = $(value NET)
export RUN_VM_DEVICE = $(value DEVICE)
bin := $(VENV)/bin
pytest := $(bin)/python -m pytest -q --times
# Tests that ARGS chooses need not be among both the fast ones and those with machines.
or_none := $(if $(ARGS),|| [ $$? = 5 ])
# Python's programs are started thousands of times here: none is to be compiled each time.
unexport PYTHONDONTWRITEBYTECODE
# Targets run one after the other, in the order that is written, whatever -j says.
.NOTPARALLEL:
# Results of make are made again only by asking; nothing here is a file.
.PHONY: help setup run-vm test test-law test-fast soak bench qemu images lint format stub clean distclean
.DEFAULT_GOAL := help

help:
	@echo 'make run-vm       a root shell in a guest whose disk Python serves over VMBus'
	@echo '                  CMD="..." runs that instead, passes its output and its success on'
	@echo '                  KERNEL=5.10|6.1|6.12|vmlinuz MODULES=lib/modules/<version> APPEND='
	@echo '                  SMP=2 MEM=1G ACCEL=auto|tcg|kvm|nested DISKS="a.raw new.raw:2G"'
	@echo '                  NET="user|tap|tap:NAME|bridge:NAME|netns:NAME|none"'
	@echo '                  DEVICE="path.py:Class" QEMU=program TIMEOUT=300'
	@echo 'make test         every test, those that fail fastest first (half an hour)'
	@echo 'make test-fast    the tests without virtual machines (two minutes)'
	@echo 'make soak         the long runs of the same tests (a night)'
	@echo 'make bench        benchmarks, as ratios'
	@echo 'make test-law     the rules of the house, and that the documents are right (seconds)'
	@echo 'make lint         ruff, mypy, and a look at the shell scripts'
	@echo 'make stub         write the types of the C module anew, after a change of a header'
	@echo 'make qemu         only build QEMU with the device'
	@echo 'make images       only build what guests are made of'
	@echo 'make clean        remove what was made in this tree'
	@echo 'make distclean    the same, and the cache with QEMU and the images'

setup:
	@tools/setup $(VENV)

run-vm: setup
	@tools/run-vm $(bin)/python "$(KERNEL)" "$(MODULES)" "$(SMP)" "$(MEM)" "$(ACCEL)" \
		"$(QEMU)" "$(TIMEOUT)"

# What fails fastest runs first, and what takes minutes to build is built when it is needed. The
# tests without machines mostly wait: four processes keep two processors busy. A machine keeps one
# busy, and waits less.
test: lint test-law test-fast
	@$(MAKE) --no-print-directory qemu images
	@$(pytest) -m machines --numprocesses 2 --dist loadgroup $(ARGS) $(or_none)

test-law: setup
	@$(bin)/python -m pytest -qq $(wildcard tests/unit/law tests/unit/docs)

test-fast: setup
	@$(pytest) -m 'not machines' --ignore tests/vm --numprocesses 4 $(ARGS) $(or_none)

soak: setup qemu images
	@VHOSTVMBUS_SOAK=1 $(pytest) -rA -o timeout=3600 $(ARGS)

bench: setup
	@$(bin)/python -m benchmarks $(ARGS)

qemu: setup
	@qemu/build

images: setup
	@guest-images/build all

lint: setup
	@$(bin)/ruff format --check -q . qemu/build guest-images/build
	@$(bin)/ruff check -q . qemu/build guest-images/build
	@$(bin)/python -m vhostvmbus.engine.stub --check
	@$(bin)/mypy --strict vhostvmbus tools/buildlib
	@for script in tools/setup tools/run-vm .ci/run guest-images/root/make-image \
		guest-images/initramfs/*[!s]; do sh -n $$script || exit 1; done

stub: setup
	@$(bin)/python -m vhostvmbus.engine.stub

format: setup
	@$(bin)/ruff format . qemu/build guest-images/build
	@$(bin)/ruff check --fix . qemu/build guest-images/build

clean:
	rm -rf $(VENV) build *.egg-info vhostvmbus/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/vhostvmbus"
