# SPDX-License-Identifier: GPL-2.0-or-later
"""The map of translated code that a front end under dynamic translation shares.

docs/vhost-user-vmbus.md, *Translated code* and *VMBUS_SET_CODE_MAP*. One bit for each 4 KiB page;
a back end that wrote guest pages fences, tests the pages' bits and has the front end discard the
translations of those that are set, before it publishes the packet's completion: ``written``.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vhostvmbus.engine import ffi, lib
from vhostvmbus.memory.shared_file import is_shared_memory
from vhostvmbus.wire.errors import FrontEndError
from vhostvmbus.wire.regions import MAX_REGIONS, lies_in_code_map
from vhostvmbus.wire.vmbus import PAGE_SIZE

if TYPE_CHECKING:
    from vhostvmbus._engine import Pointer, vvb_codemap


class CodeMap:
    """A mapped code map. The caller keeps ``fd``.

    ``regions`` are ``(guest_phys_addr, size, first_bit)``. Raises :exc:`FrontEndError` if the file
    is shorter than ``map_bytes``, or if a region's bits do not lie in the map.
    """

    def __init__(self, fd: int, map_bytes: int, regions: Sequence[tuple[int, int, int]]) -> None:
        if len(regions) > MAX_REGIONS:
            raise FrontEndError(
                f"{len(regions)} regions in a code map, at most {MAX_REGIONS} are allowed"
            )
        if map_bytes and not is_shared_memory(fd):
            raise FrontEndError("the code map is in no memfd")
        if map_bytes and os.fstat(fd).st_size < map_bytes:
            raise FrontEndError(
                f"the code map has {map_bytes} bytes, its file {os.fstat(fd).st_size}"
            )
        for gpa, size, first_bit in regions:
            if gpa % PAGE_SIZE or size % PAGE_SIZE or gpa + size > 1 << 64:
                raise FrontEndError(f"code map region {gpa:#x} + {size:#x} is not whole pages")
            if not lies_in_code_map(size, first_bit, map_bytes):
                raise FrontEndError(f"code map region {gpa:#x} + {size:#x} exceeds the map")
        table = ffi.new("struct vvb_code_region[]", len(regions))
        for entry, (gpa, size, first_bit) in zip(table, regions, strict=True):
            entry.gpa, entry.size, entry.first_bit = gpa, size, first_bit
        error = ffi.new("int *")
        handle = lib.vvb_codemap_new(fd, map_bytes, table, len(regions), error)
        if handle == ffi.NULL:
            raise FrontEndError(f"code map: {os.strerror(error[0])}")
        self._handle = ffi.gc(handle, lib.vvb_codemap_free)

    @property
    def handle(self) -> "Pointer[vvb_codemap]":
        """The engine's ``struct vvb_codemap *``, valid as long as this object."""
        return self._handle
