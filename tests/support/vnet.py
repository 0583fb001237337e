# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtio-net header in front of a frame, read and written by itself.

Source: Virtual I/O Device 1.2, section 5.1.6.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

HEADER = struct.Struct("<BBHHHH")
"""The layout of ``struct virtio_net_hdr``: flags, gso_type, hdr_len, gso_size, csum_start,
csum_offset.
"""


class Gso(IntEnum):
    """A way to cut a frame that is longer than the MTU: ``gso_type``."""

    NONE = 0
    TCPV4 = 1
    TCPV6 = 4


@dataclass(frozen=True, slots=True)
class Offload:
    """The work that has still to be done to a frame, or was done."""

    needs_checksum: bool = False
    checksum_valid: bool = False
    start: int = 0
    offset: int = 0
    gso: int = Gso.NONE
    segment_size: int = 0
    header_length: int = 0

    def pack(self) -> bytes:
        """Returns the header."""
        return HEADER.pack(
            self.needs_checksum | self.checksum_valid << 1,
            self.gso,
            self.header_length,
            self.segment_size,
            self.start,
            self.offset,
        )

    @classmethod
    def unpack(cls, header: bytes) -> Offload:
        """Reads the header that a frame's first bytes are."""
        bits, gso, headers, segment, start, offset = HEADER.unpack_from(header)
        return cls(bool(bits & 1), bool(bits & 2), start, offset, gso, segment, headers)
