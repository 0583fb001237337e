# SPDX-License-Identifier: GPL-2.0-or-later
"""Image locks: one writer, or any number of readers.

Open file description locks (fcntl(2), ``F_OFD_SETLK``), so they belong to the open file, are
seen by other opens in the same process, and vanish with the process.  The bytes are those that
QEMU locks (its ``block/file-posix.c``: permissions in use from byte 100, permissions denied to
others from byte 200), so QEMU and this project respect each other's use of an image, and a
read-only image can be shared with QEMU too.

How: a user takes shared locks on the byte of every permission it uses and of every permission
it denies others, then looks whether anybody denies what it uses or uses what it denies.  Since
both sides announce before they look, two cannot both succeed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

_USED_BASE: Final = 100
_DENIED_BASE: Final = 200

CONSISTENT_READ: Final = 0
WRITE: Final = 1
RESIZE: Final = 3
"""Bit numbers of QEMU's ``BLK_PERM_*``."""

_FLOCK = struct.Struct("@hhqqi4x")
"""``struct flock`` of 64-bit Linux: type, whence, start, length, pid."""


class DiskLocked(OSError):
    """Another user has the image open in a way that does not go with ours."""


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _held_by_others(fd: int, byte: int) -> bool:
    """Returns whether another open file holds any lock on the byte."""
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    kind: int = _FLOCK.unpack(found)[0]
    return kind != fcntl.F_UNLCK


def lock_image(fd: int, path: str, *, read_only: bool) -> None:
    """Locks an open image until the last duplicate of ``fd`` is closed.

    Raises :class:`DiskLocked` if somebody else uses it.  On a file system without locks
    (``ENOLCK``, ``EINVAL``, ``EOPNOTSUPP``) the image is used unlocked.
    """
    used = (CONSISTENT_READ,) if read_only else (CONSISTENT_READ, WRITE, RESIZE)
    denied = (WRITE, RESIZE)
    try:
        for bit in used:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, _USED_BASE + bit))
        for bit in denied:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, _DENIED_BASE + bit))
        clash = any(_held_by_others(fd, _DENIED_BASE + bit) for bit in used) or any(
            _held_by_others(fd, _USED_BASE + bit) for bit in denied
        )
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            clash = True
        elif error.errno in (errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP):
            return
        else:
            raise
    if clash:
        raise DiskLocked(
            errno.EBUSY,
            "the image is in use by another process (or by another disk of this one); "
            + ("somebody may be writing to it" if read_only else "only one may write to it"),
            path,
        )
