# SPDX-License-Identifier: GPL-2.0-or-later
"""Which file each disk of a running guest is, remembered for the next back end.

A guest that waits for a new back end goes on with its disk as it knows it. If the image was deleted
meanwhile, and ``PATH:SIZE`` has made a new one, or another file was put in its place, that would be
a disk that has changed its contents, under the same name. So a mark of each file is kept with the
packets in flight (:attr:`Channel.note`), and compared.

Invariant: a mark is that of a file for as long as it exists, and of no other, whatever its name; an
inode number alone would not do, for it is given away again at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Mapping
from typing import Final, Protocol, runtime_checkable

_MAGIC: Final = b"DSK1"
_SIZE: Final = 7
_ENTRY: Final = 1 + _SIZE
MAX_MARKS: Final = (256 - len(_MAGIC)) // _ENTRY
"""The most disks that a note has room for; those at the lowest LUNs are remembered."""

_AT_EMPTY_PATH: Final = 0x1000
_MAX_HANDLE: Final = 128
"""``linux/fcntl.h`` and ``linux/exportfs.h``."""


class _Handle(ctypes.Structure):
    _fields_ = (
        ("bytes", ctypes.c_uint),
        ("type", ctypes.c_int),
        ("data", ctypes.c_ubyte * _MAX_HANDLE),
    )


_name_to_handle_at = ctypes.CDLL(None, use_errno=True).name_to_handle_at


@runtime_checkable
class Marked(Protocol):
    """A backing that can be told from all others."""

    def mark(self) -> bytes:
        """Returns 7 bytes."""
        ...


def mark_of(fd: int) -> bytes:
    """Returns the mark of an open file or block device."""
    status = os.fstat(fd)
    handle, mount = _Handle(_MAX_HANDLE), ctypes.c_int()
    # The handle that NFS would give out: inode number and generation, or what the file system has.
    failed = _name_to_handle_at(fd, b"", ctypes.byref(handle), ctypes.byref(mount), _AT_EMPTY_PATH)
    who = b"" if failed else bytes(handle.data)[: handle.bytes]
    text = f"{status.st_dev} {status.st_ino} {status.st_rdev} ".encode() + who
    return hashlib.sha256(text).digest()[:_SIZE]


def pack(marks: Mapping[int, bytes]) -> bytes:
    """Returns the note for the marks of disks, by their LUN."""
    return _MAGIC + b"".join(bytes((lun,)) + marks[lun] for lun in sorted(marks)[:MAX_MARKS])


def parse(note: bytes) -> dict[int, bytes]:
    """Returns the marks in a note; none if it is no such note. It has been in other hands."""
    if note[: len(_MAGIC)] != _MAGIC:
        return {}
    rest = note[len(_MAGIC) :]
    parts = [rest[at : at + _ENTRY] for at in range(0, len(rest) - _ENTRY + 1, _ENTRY)]
    return {part[0]: part[1:] for part in parts}
