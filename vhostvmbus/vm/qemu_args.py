# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMU command line of a machine with VMBus devices; the README explains each option.

Pure: a :class:`Machine description <Hardware>` in, words out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENLIGHTENMENTS = (
    "hv-relaxed",
    "hv-vpindex",
    "hv-synic",
    "hv-time",
    "hv-reset",
    "hv-runtime",
    "hv-vapic",
    "hv-crash",
    "hv-stimer",
)
"""vpindex and synic are what VMBus needs; the others spare the guest slower ways."""

CPU = {
    # Linux then clears and copies with string instructions, which our QEMU does a page at a time.
    "tcg": ("qemu64", "erms", "fsrm", "fsrs"),
    # kvm=off hides KVM's own signature: Linux would take it for the hypervisor, not Hyper-V.
    "kvm": ("host", "kvm=off"),
}
ACCEL = {"tcg": "tcg,thread=multi,tb-size=512", "kvm": "kvm"}
PORTS = (("console", 0x3F8, 4), ("stdout", 0x2F8, 3), ("stderr", 0x3E8, 5), ("control", 0x2E8, 6))
"""Serial ports COM1 to COM4: name, I/O port, interrupt. Interrupts are not shared, because an ISA
line that two devices drive loses edges, and 7 is the VMBus bridge's."""

RECONNECT_MILLISECONDS = 250


@dataclass(frozen=True)
class Hardware:
    """The hardware of a machine. ``memory`` is as QEMU writes it; ``port_fds`` are connected
    sockets.
    """

    qemu: Path
    firmware: Sequence[Path]
    accel: str
    kernel: Path
    initramfs: Path
    append: str
    port_fds: dict[str, int]
    qmp_fd: int
    sockets: Sequence[Path] = ()
    smp: int = 2
    memory: str = "1G"
    machine: str = "pc"
    cpu: str | None = None
    vmbus: bool = True
    virtio_disks: Sequence[str] = ()
    """Paths of raw images for disks that QEMU itself serves."""
    extra: Sequence[str] = field(default_factory=tuple)


def command_line(hardware: Hardware) -> list[str]:
    """Returns QEMU and its arguments."""
    accel = hardware.accel
    cpu = hardware.cpu or ",".join((*CPU[accel], *ENLIGHTENMENTS))
    words = [str(hardware.qemu)]
    for folder in hardware.firmware:
        words += ["-L", str(folder)]
    words += ["-nodefaults", "-no-user-config", "-display", "none"]
    words += ["-accel", ACCEL[accel]]
    words += ["-machine", f"{hardware.machine},memory-backend=ram"]
    words += ["-cpu", cpu, "-smp", str(hardware.smp), "-m", hardware.memory]
    words += ["-object", f"memory-backend-memfd,id=ram,size={hardware.memory},share=on"]
    words += ["-kernel", str(hardware.kernel), "-initrd", str(hardware.initramfs)]
    words += ["-append", hardware.append]
    words += ["-chardev", f"socket,id=qmp,fd={hardware.qmp_fd}", "-mon", "qmp,mode=control"]
    for index, (name, iobase, irq) in enumerate(PORTS):
        words += ["-chardev", f"socket,id={name},fd={hardware.port_fds[name]}"]
        words += [
            "-device",
            f"isa-serial,chardev={name},index={index},iobase={iobase:#x},irq={irq}",
        ]
    if hardware.vmbus:
        words += ["-device", "vmbus-bridge"]
    for index, path in enumerate(hardware.sockets):
        words += [
            "-chardev",
            f"socket,id=vmbus{index},path={_escaped(str(path))},reconnect-ms={RECONNECT_MILLISECONDS}",
            "-device",
            f"vhost-user-vmbus,chardev=vmbus{index}",
        ]
    for index, name in enumerate(hardware.virtio_disks):
        words += [
            "-drive",
            f"if=none,id=disk{index},file={_escaped(name)},format=raw",
            "-device",
            f"virtio-blk-pci,drive=disk{index}",
        ]
    return words + list(hardware.extra)


def _escaped(value: str) -> str:
    """Returns a value for one of QEMU's option lists, in which a comma ends it."""
    return value.replace(",", ",,")
