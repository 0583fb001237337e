# SPDX-License-Identifier: GPL-2.0-or-later
"""Real KVM without hardware for it: the machine in a machine.

The outer machine (level 1) is translated by QEMU, has an AMD processor with SVM, and runs a
kernel with kvm-amd and the Debian root file system of any guest. In it this same package runs:
``vhostvmbus vm --accel kvm``, with our QEMU, on KVM, and the back end in Python. The inner guest
(level 2) is the user's; its disks are virtio disks of the outer machine.

What level 1 needs beyond its root file system comes in an archive behind its initramfs: QEMU
with the libraries that it was linked with, firmware, this package, level 2's kernel and
initramfs.
"""

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vhostvmbus.vm import images
from vhostvmbus.vm.cpio import CpioArchive
from vhostvmbus.vm.errors import SetupError
from vhostvmbus.vm.machine import MachinePlan

PLACE = "/run/vhostvmbus/nested"
"""The path of the archive's ``/guest/nested`` once level 1 has booted."""
LIBRARY = re.compile(r"(?:\S+ => )?(/\S+) \(0x")
FIRMWARE = ("bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin")
MEMORY_FOR_LEVEL_1 = 2048
"""MiB that level 1 has for itself."""
CPU = "EPYC-v4,+svm"
UNITS = {"": 1, "M": 1, "G": 1024, "T": 1 << 20}


@dataclass(frozen=True)
class Inner:
    """The task of level 2: run ``command``, or give a shell if that is ``None``."""

    command: str | None
    timeout: float
    devices: Sequence[str]
    package: Path
    """The folder of the Python package that runs in level 1."""


def megabytes(memory: str) -> int:
    """Returns a size as QEMU writes it, in MiB."""
    found = re.fullmatch(r"(\d+)([MGT]?)", memory.upper())
    if not found:
        raise SetupError(f"memory {memory}: write it like 1024M or 1G")
    return int(found[1]) * UNITS[found[2]]


def wrap(plan: MachinePlan, inner: Inner) -> MachinePlan:
    """Returns the plan of level 1 for level 2's ``plan``; :func:`script` is what to run there."""
    kernel = images.find_kernel(images.KERNEL_SERIES[0])
    disks = len(plan.disks) + bool(plan.root or plan.persistent_root)
    template = str(images.root_template()).replace(",", ",,")
    return replace(
        plan,
        kernel=kernel.image,
        initramfs=images.find_initramfs(kernel),
        accel="tcg",
        bus="virtio",
        networks=(),
        backends=(),
        # Level 1's own root: the disk after all of level 2's. Nothing is written to the template.
        extra=(
            "-drive",
            f"if=none,id=level1,file={template},format=raw,snapshot=on",
            "-device",
            "virtio-blk-pci,drive=level1",
        ),
        append=f"root={_disk(disks)}",
        # SVM as QEMU translates it is not safe with two processors: every few runs memory of
        # level 1 or 2 was corrupted, also with a QEMU without our patches. Never with one.
        smp=1,
        memory=f"{megabytes(plan.memory) + MEMORY_FOR_LEVEL_1}M",
        machine="q35",
        cpu=CPU,
        shell=False,
        files=(_archive(plan, inner),),
    )


def _disk(index: int) -> str:
    if index > 25:
        raise SetupError("too many disks")
    return f"/dev/vd{chr(ord('a') + index)}"


def script(plan: MachinePlan, inner: Inner) -> str:
    """Returns the shell script that starts level 2 from level 1."""
    words = ["python3", "-m", "vhostvmbus", "vm", "--accel", "kvm"]
    words += ["--qemu", f"{PLACE}/qemu", "--kernel", f"{PLACE}/vmlinuz"]
    words += ["--initramfs", f"{PLACE}/initramfs", "--timeout", f"{inner.timeout:.0f}"]
    words += ["--smp", str(plan.smp), "--mem", plan.memory, "--append", plan.append]
    words += ["--net", "none"]
    first = 0
    if plan.root or plan.persistent_root:
        words += ["--root", _disk(0)]
        first = 1
    else:
        words.append("--no-root")
    for index, disk in enumerate(plan.disks):
        options = "".join("," + word for word in str(disk).split(",")[1:])
        words += ["--disk", _disk(first + index) + options]
    for name in inner.devices:
        words += ["--device", f"{PLACE}/devices/{Path(name).name}"]
    words.append("--keep-no-output")  # level 1's files end with it
    words += [f"--qemu-arg={word}" for word in plan.extra]
    lines = [
        "modprobe kvm-amd || exit 125",
        f"export PYTHONPATH={PLACE}/python PYTHONDONTWRITEBYTECODE=1 HOME=/root",
        f"export XDG_CACHE_HOME=/run/vhostvmbus/cache VHOSTVMBUS_FIRMWARE={PLACE}/firmware",
    ]
    if inner.command is None:
        lines += [f"{shlex.join(words)} </dev/ttyS0 >/dev/ttyS0 2>&1", "poweroff"]
    else:
        lines.append(shlex.join([*words, "--cmd", inner.command]))
    return "\n".join(lines) + "\n"


def _archive(plan: MachinePlan, inner: Inner) -> bytes:
    archive = CpioArchive()
    place = "/guest/nested"
    libraries = _libraries(plan.qemu)
    loader = next((path for path in libraries if path.name.startswith("ld-linux")), None)
    if loader is None:
        raise SetupError(f"{plan.qemu} is not a dynamically linked program")
    archive.add_file(f"{place}/qemu-system-x86_64", plan.qemu.read_bytes(), 0o755)
    for path in libraries:
        archive.add_file(f"{place}/lib/{path.name}", path.read_bytes(), 0o755)
    start = f"#!/bin/sh\nd={PLACE}\n"
    start += f'exec $d/lib/{loader.name} --library-path $d/lib $d/qemu-system-x86_64 "$@"\n'
    archive.add_file(f"{place}/qemu", start.encode(), 0o755)
    folders = images.firmware_folders()
    for name in FIRMWARE:
        blob = next((f / name for f in folders if (f / name).is_file()), None)
        if blob is None:
            raise SetupError(f"no firmware {name}; install seabios and qemu-system-data")
        archive.add_file(f"{place}/firmware/{name}", blob.read_bytes())
    archive.add_file(f"{place}/vmlinuz", plan.kernel.read_bytes())
    archive.add_file(f"{place}/initramfs", plan.initramfs.read_bytes())
    archive.add_tree(f"{place}/python/{inner.package.name}", inner.package)
    qmp = importlib.util.find_spec("qemu.qmp")
    assert qmp is not None
    assert qmp.origin is not None
    archive.add_tree(f"{place}/python/qemu/qmp", Path(qmp.origin).parent)
    for name in inner.devices:
        path = Path(name.rpartition(":")[0])
        archive.add_file(f"{place}/devices/{path.name}", path.read_bytes())
    return archive.finish()


def _libraries(program: Path) -> list[Path]:
    """Returns the shared libraries of ``program``, and the loader."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True)
    return [Path(found[1]) for found in LIBRARY.finditer(done.stdout)]
