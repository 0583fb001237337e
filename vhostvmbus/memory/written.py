# SPDX-License-Identifier: GPL-2.0-or-later
"""Collects what was written to guest memory, for those who must know before the guest is told.

Whoever writes to guest memory reports here: a plan's transfers and a device's C in the engine
(``written.c``), external data and GPADL mappings through the channel. Who listens is known here
alone: today the map of translated code, docs/vhost-user-vmbus.md, *Translated code*.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vhostvmbus.engine import ffi, lib
from vhostvmbus.memory.codemap import CodeMap
from vhostvmbus.wire.vmbus import PAGE_SIZE

if TYPE_CHECKING:
    from vhostvmbus._engine import Pointer, vvb_memory

Spans = Sequence[tuple[int, int]]
"""Stretches of guest memory: ``(guest_phys_addr, length)`` in bytes."""


class WrittenMemory:
    """The one tracker of a guest's memory. Every method may be called from any thread.

    ``discard`` (set by the server) has the front end discard translations of these stretches, whole
    pages, and returns when it has acknowledged that; it raises if it cannot.
    """

    def __init__(self, memory: "Pointer[vvb_memory]") -> None:
        self._memory = memory
        self._code_map: CodeMap | None = None
        self.watched = False
        """Set if anybody has to know what is written. The engine knows it too, and never earlier:
        each completion looks here, and a call into C would cost it a tenth of its time."""
        self.discard: Callable[[list[tuple[int, int]]], None] | None = None

    def use_code_map(self, code_map: CodeMap | None) -> None:
        """Has reports looked up in ``code_map``, or in none.

        Returns when nobody uses the map before any more.
        """
        handle = ffi.NULL if code_map is None else code_map.handle
        self.watched = self.watched or code_map is not None
        lib.vvb_memory_use_codemap(self._memory, handle)
        self._code_map = code_map
        self.watched = code_map is not None

    def report(self, spans: Spans) -> int:
        """Reports what was written, after the last write and before the guest is told of it.

        Returns how many stretches the front end was made to discard. Raises what ``discard``
        raises, :exc:`RuntimeError` if there is none; then the guest must not be told.
        """
        if not spans or not self.watched:
            return 0
        hits = self._look_up(spans)
        if hits:
            if self.discard is None:
                raise RuntimeError("a code map without a way to tell the front end")
            self.discard(hits)
        return len(hits)

    def _look_up(self, spans: Spans) -> list[tuple[int, int]]:
        table = ffi.new("struct vvb_span[]", len(spans))
        pages = len(spans)
        for entry, (gpa, length) in zip(table, spans, strict=True):
            entry.gpa, entry.len = gpa, length
            pages += length // PAGE_SIZE + 2
        cap = pages // 2 + len(spans) + 1
        out = ffi.new("struct vvb_span[]", cap)
        count = lib.vvb_memory_written(self._memory, table, len(spans), out, cap)
        return [(out[i].gpa, out[i].len) for i in range(count)]
