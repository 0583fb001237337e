# SPDX-License-Identifier: GPL-2.0-or-later
"""Transfer pages: how a packet describes bytes in pages that the receiver lent to the sender.

Layout (``struct vmtransfer_page_packet_header`` of ``include/linux/hyperv.h``), between the
descriptor and the payload of a DATA_USING_XFER_PAGES packet: ``set_id u16, sender_owns_set u8,
reserved u8, range_count u32``, then for each range ``byte_count u32, byte_offset u32``.
Little-endian. Offsets count from the start of the page set, which is a GPADL that both ends
named ``set_id`` in the device's own protocol.
"""

import struct
from collections.abc import Iterable

_HEADER = struct.Struct("<HBxI")
_RANGE = struct.Struct("<II")


def build_transfer_pages(
    set_id: int, ranges: Iterable[tuple[int, int]], *, sender_owns_set: bool = False
) -> bytes:
    """Returns the header for ``(byte_count, byte_offset)`` ranges; what :meth:`Channel.send` takes.

    Nothing is checked, so that tests can lie; values must fit their fields.
    """
    parts = [_RANGE.pack(count, offset) for count, offset in ranges]
    return _HEADER.pack(set_id, sender_owns_set, len(parts)) + b"".join(parts)
