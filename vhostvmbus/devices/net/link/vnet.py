# SPDX-License-Identifier: GPL-2.0-or-later
"""The header that travels before each frame through a TAP device: virtio-net's, 10 bytes.

Pure: bytes in, :class:`~vhostvmbus.devices.net.link.Offload` out, and back. Layout and values:
Virtual I/O Device 1.2, section 5.1.6 (``struct virtio_net_hdr`` without ``num_buffers``), and
``linux/virtio_net.h``; the fields are little-endian here, which is the byte order of the hosts
that we run on.

    offset  0  flags           1: checksum needed, 2: checksum valid
            1  gso_type        0: none, 1: TCP over IPv4, 4: TCP over IPv6, 0x80: with ECN
            2  hdr_len         16 bits
            4  gso_size        16 bits
            6  csum_start      16 bits
            8  csum_offset     16 bits
"""

import struct
from typing import Final

from vhostvmbus.devices.net.link import PLAIN, Buffer, Gso, Offload

SIZE: Final = 10
_LAYOUT: Final = struct.Struct("<BBHHHH")
_NEEDS_CHECKSUM: Final = 1
_CHECKSUM_VALID: Final = 2
_EMPTY: Final = bytes(SIZE)
_VALID: Final = bytes([_CHECKSUM_VALID]) + bytes(SIZE - 1)
_CHECKED: Final = Offload(checksum_valid=True)


class BadHeader(ValueError):
    """A header, or an offload, that means nothing."""


def pack(offload: Offload) -> bytes:
    """The header for a frame that is sent. Raises :class:`BadHeader` for what does not fit it."""
    if offload is PLAIN:
        return _EMPTY
    flags = _NEEDS_CHECKSUM if offload.needs_checksum else 0
    if offload.checksum_valid:
        flags |= _CHECKSUM_VALID
    if offload.gso and not (offload.needs_checksum and offload.segment_size):
        raise BadHeader("a frame to be cut needs a segment size and a checksum")
    try:
        return _LAYOUT.pack(
            flags,
            offload.gso,
            offload.header_length,
            offload.segment_size,
            offload.start,
            offload.offset,
        )
    except struct.error as error:
        raise BadHeader(f"a field is longer than 16 bits: {error}") from None


def unpack(header: Buffer) -> Offload:
    """What is said of a received frame by its header, the first :data:`SIZE` bytes given.

    Raises :class:`BadHeader` for a kind of segment that was never asked for.
    """
    if header == _EMPTY:
        return PLAIN
    if header == _VALID:
        return _CHECKED
    flags, kind, header_length, segment_size, start, offset = _LAYOUT.unpack_from(header)
    try:
        gso = Gso(kind)
    except ValueError:
        raise BadHeader(f"segments of type {kind:#x}") from None
    return Offload(
        needs_checksum=bool(flags & _NEEDS_CHECKSUM),
        checksum_valid=bool(flags & _CHECKSUM_VALID),
        start=start,
        offset=offset,
        gso=gso,
        segment_size=segment_size,
        header_length=header_length,
    )
