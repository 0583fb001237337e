# SPDX-License-Identifier: GPL-2.0-or-later
"""The memfd of ``VMBUS_GPADL_CREATE``: seals, size, GPA ranges."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence

from vhostvmbus.wire.errors import GpadlInvalid, GuestError
from vhostvmbus.wire.gpa import GpaRange, build_ranges, parse_ranges

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def read_list(fd: int, range_count: int, range_bytes: int) -> list[GpaRange]:
    """Returns the ``range_count`` GPA ranges that fill ``range_bytes`` bytes of the memfd ``fd``.

    Raises :class:`GpadlInvalid` if the memfd is not sealed, is too small, or does not hold exactly
    that.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise GpadlInvalid(f"the GPADL's list is not in a memfd: {error.strerror}") from None
    if seals & SEALS != SEALS:
        raise GpadlInvalid(f"the memfd of the GPADL's list is not sealed (seals {seals:#x})")
    size = os.fstat(fd).st_size
    if size < range_bytes:
        raise GpadlInvalid(f"the GPADL's list has {range_bytes} bytes, its memfd {size}")
    data = os.pread(fd, range_bytes, 0)
    try:
        ranges = parse_ranges(data, range_count)
    except GuestError as error:
        raise GpadlInvalid(f"the GPADL's list is malformed: {error}") from error
    used = sum(item.wire_size for item in ranges)
    if used != range_bytes:
        raise GpadlInvalid(f"the GPADL's list has {range_bytes} bytes, its ranges take {used}")
    return ranges


def write_list(ranges: Sequence[GpaRange]) -> tuple[int, int]:
    """Returns a sealed memfd with ``ranges``, and how many bytes it has. The caller closes it."""
    data = build_ranges(ranges)
    fd = os.memfd_create("gpadl", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd, len(data)
