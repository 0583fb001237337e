# SPDX-License-Identifier: GPL-2.0-or-later
"""Images that are not raw, told by what stands in them.

Served as if it were raw, such an image shows a guest its header and tables in the place of a disk,
and the first thing that the guest writes destroys them. A guest can write the same bytes to the
start of a raw disk of its own; all that comes of it is that whoever serves it next has to insist.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Final, NamedTuple


class Format(NamedTuple):
    """A format of images."""

    name: str
    """The name that people know it by."""
    qemu: str | None
    """The name that ``qemu-img`` knows it by; ``None`` if there is nothing to convert."""


_QCOW2: Final = Format("qcow2", "qcow2")
_VHD: Final = Format("VHD", "vpc")
_VHDX: Final = Format("VHDX", "vhdx")
_VMDK: Final = Format("VMDK", "vmdk")
_VDI: Final = Format("VDI", "vdi")
_ISO: Final = Format("ISO 9660", None)

_SIGNATURES: Final = (
    (0, b"QFI\xfb", _QCOW2),
    (0, b"vhdxfile", _VHDX),
    (0, b"conectix", _VHD),
    (0, b"KDMV", _VMDK),
    (0, b"COWD", _VMDK),
    (0, b"# Disk DescriptorFile", _VMDK),
    (0x40, b"\x7f\x10\xda\xbe", _VDI),
    (0x8001, b"CD001", _ISO),
)
"""Offset and bytes, from the formats' own descriptions: QEMU's ``docs/interop/qcow2.txt``,
[MS-VHDX] section 2.2.1, Microsoft's "Virtual Hard Disk Image Format Specification" (the footer, of
which all but fixed disks have a copy in front), VMware's "Virtual Disk Format 5.0", VirtualBox's
``VDICore.h``, ECMA-119 section 8.1."""
_HEAD: Final = 0x8006
_FOOTER: Final = 512


def find_format(fd: int, size: int) -> Format | None:
    """Returns the format of an open image of ``size`` bytes, ``None`` if it may be a raw one."""
    head = os.pread(fd, _HEAD, 0)
    for offset, signature, found in _SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            return found
    # A fixed VHD is a raw disk with a footer behind it, of 511 bytes if it is very old.
    tail = os.pread(fd, _FOOTER, max(0, size - _FOOTER))
    return _VHD if tail[:8] == b"conectix" or tail[1:9] == b"conectix" else None


def advice(path: str, found: Format) -> str:
    """Returns what is the matter with an image, and what to do."""
    if found.qemu is None:
        return (
            f"{path}: this is an {found.name} image, for a CD drive, and there is none here; to "
            f"show its bytes to the guest as a disk write {path},ro,format=raw"
        )
    raw = str(Path(path).with_suffix(".raw"))
    if raw == path:
        raw = f"{path}.raw"
    command = shlex.join(["qemu-img", "convert", "-f", found.qemu, "-O", "raw", path, raw])
    return (
        f"{path}: this is a {found.name} image, and the guest would see its inside; make a raw one "
        f"({command}) and use that. To show the guest its bytes as they are write {path},format=raw"
    )
