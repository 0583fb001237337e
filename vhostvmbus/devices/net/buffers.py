# SPDX-License-Identifier: GPL-2.0-or-later
"""The two buffers that a guest lends the card: cut into sections, mapped for as long as it does.

The receive buffer's sections belong to the card, one at a time to the guest: it gets them with a
packet and gives them back with that packet's completion. A few are for answers; those for frames
are the data path's (:mod:`~vhostvmbus.devices.net.datapath`). The send buffer's sections belong to
the guest; the card copies what a packet says is in one.

Invariants: a section is in the free list or in one packet, never in two; nothing outside a section
is read or written; bytes of the send buffer are copied before they are looked at.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from itertools import accumulate
from typing import Final, Protocol

from vhostvmbus.devices.net.errors import SectionError
from vhostvmbus.engine import lib
from vhostvmbus.memory import ExternalData

FRAME_OFFSET: Final[int] = lib.VVB_NET_FRAME_OFFSET
"""The offset at which a frame begins in a receive section."""
SECTION_TAIL: Final[int] = lib.VVB_NET_SECTION_TAIL
"""The bytes at the end of a receive section that stay unused: newer Windows writes there itself."""
DEFAULT_SECTION: Final = 1728
"""The bytes of a receive section for frames of the ordinary size; Linux reckons with as many."""
COALESCED_SECTION: Final = 13312
"""The bytes of a receive section for a guest that takes a frame in several: five hold any frame,
and the largest buffer that Linux has, 31 MiB, holds 2441 sections. Guests' tests reckon with 2427.
"""
SEND_SECTION: Final[int] = lib.VVB_NET_SEND_SECTION
"""The bytes of a send section."""
MAX_SEND: Final = 1 << 17
"""The most bytes of a packet that may be in the send buffer: more than the longest frame needs."""
MAX_BUFFER: Final = 31 << 20
"""The longest buffer taken, in bytes: the largest that Linux has."""
CONTROL_RESERVE: Final = 8
"""How many receive sections are kept for RNDIS answers; fewer of a small buffer."""
MIN_SECTIONS: Final = 8
"""The fewest receive sections: five for the longest frame, two for answers, one to spare. Linux
lends ten and more (``ethtool -G``).
"""


def section_size(frame_size: int, coalescing: bool) -> int:
    """Returns the bytes of a receive section for frames of ``frame_size`` bytes, a tag included."""
    least = COALESCED_SECTION if coalescing else DEFAULT_SECTION
    return max(least, (FRAME_OFFSET + frame_size + SECTION_TAIL + 63) & ~63)


class Section:
    """One receive section."""

    __slots__ = ("number", "offset", "spans", "views")

    def __init__(
        self, number: int, offset: int, views: list[memoryview], spans: list[tuple[int, int]]
    ) -> None:
        self.number = number
        self.offset = offset
        """The bytes from the buffer's start."""
        self.views = views
        """The section's guest memory."""
        self.spans = spans
        """All of the section as ``(gpa, length)``."""

    def write(self, data: bytes) -> None:
        """Puts bytes at the start; they must fit."""
        for view in self.views:
            part = data[: len(view)]
            view[: len(part)] = part
            data = data[len(part) :]
        if data:
            raise ValueError(f"{len(data)} bytes do not fit")


class Frames(Protocol):
    """The owner of the sections for frames: :class:`~vhostvmbus.devices.net.datapath.DataPath`."""

    @property
    def free_sections(self) -> int:
        """The number of sections that the guest does not have."""

    def section(self, lease: int) -> int | None:
        """Returns a free section, or ``None`` if there is none."""

    def give(self, lease: int, section: int) -> None:
        """Gives a section back: it is free again."""


class ReceiveBuffer:
    """The receive sections of one card. Any thread may take and give back."""

    def __init__(
        self, mapping: ExternalData, set_id: int, size: int, path: Frames | None = None
    ) -> None:
        """Cuts ``mapping`` into sections of ``size`` bytes. Raises :class:`SectionError`.

        ``set_id`` is the guest's name for the buffer. With a ``path`` all but the first
        :attr:`reserve` sections are that one's.
        """
        length = len(mapping)
        count = length // size
        if length > MAX_BUFFER or count < MIN_SECTIONS:
            raise SectionError("gpadl_length", length, 4, f"sections have {size} bytes")
        self.set_id = set_id
        self.lease = 0
        """The path's number for this buffer: sections have the same numbers in all of them."""
        self.section_size = size
        self.count = count
        self.mapping = mapping
        self._views = mapping.views(writable=True, noted=False)
        self._addresses = [gpa for gpa, _ in mapping.segments]
        self._starts = [0, *accumulate(len(view) for view in self._views)]
        self._sections: list[Section | None] = [None] * count
        self._path = path
        self.reserve = min(CONTROL_RESERVE, count // 4)
        """Sections that are kept for RNDIS answers."""
        self._own = count if path is None else self.reserve
        self._free = deque(range(self._own))

    @property
    def free(self) -> int:
        """The number of sections that the guest does not have."""
        return len(self._free) + (self._path.free_sections if self._path else 0)

    def take(self) -> Section | None:
        """Returns a free section, one for answers if there is one; ``None`` if none is free."""
        try:
            return self._section(self._free.popleft())
        except IndexError:
            number = self._path.section(self.lease) if self._path is not None else None
            return None if number is None else self._section(number)

    def give(self, sections: list[Section]) -> None:
        """Takes sections back; each must have been taken, or left over by the path."""
        for section in sections:
            if section.number < self._own:
                self._free.append(section.number)
            elif self._path is not None:
                self._path.give(self.lease, section.number)

    def section_number(self, number: int) -> Section:
        """Returns a section that the path left over."""
        return self._section(number)

    def _section(self, number: int) -> Section:
        section = self._sections[number]
        if section is None:
            section = self._sections[number] = self._cut(number)
        return section

    def _cut(self, number: int) -> Section:
        offset = number * self.section_size
        views: list[memoryview] = []
        spans: list[tuple[int, int]] = []
        index, left = bisect_right(self._starts, offset) - 1, self.section_size
        skip = offset - self._starts[index]
        while left:
            view = self._views[index][skip : skip + left]
            gpa = self._addresses[index] + skip
            views.append(view)
            if spans and sum(spans[-1]) == gpa:
                spans[-1] = (spans[-1][0], spans[-1][1] + len(view))
            else:
                spans.append((gpa, len(view)))
            left -= len(view)
            index, skip = index + 1, 0
        return Section(number, offset, views, spans)


class SendBuffer:
    """The send sections of one card."""

    def __init__(self, mapping: ExternalData, size: int = SEND_SECTION) -> None:
        """Raises :class:`SectionError` if not one section of ``size`` bytes fits."""
        length = len(mapping)
        if not size <= length <= MAX_BUFFER:
            raise SectionError("gpadl_length", length, 4, f"sections have {size} bytes")
        self.mapping = mapping
        self.section_size = size
        self.count = length // size

    def read(self, number: int, size: int) -> bytes:
        """Returns a copy of ``size`` bytes from the start of a section; they may go on in the next
        ones. Raises :class:`SectionError`.
        """
        if number >= self.count:
            raise SectionError("send_buf_section_index", number, 8, f"{self.count} sections")
        start = number * self.section_size
        if size > min(MAX_SEND, len(self.mapping) - start):
            raise SectionError("send_buf_section_size", size, 12)
        return self.mapping.read(start, size)
