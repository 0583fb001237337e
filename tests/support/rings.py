# SPDX-License-Identifier: GPL-2.0-or-later
"""Both ends of a ring pair without a channel, the words in their headers, packets as bytes."""

from tests.support.ram import BASE_PFN, scattered
from vhostvmbus.memory import GuestMemory
from vhostvmbus.ring import Ring, Role
from vhostvmbus.wire.vmbus import Descriptor, align8, pack_descriptor


def ring_pair(
    memory: GuestMemory, out_pages: int = 2, in_pages: int = 2, first: int = BASE_PFN
) -> tuple[Ring, Ring]:
    """Returns the guest's and the host's end of a channel on the same pages."""
    pfns = scattered(out_pages + in_pages, first)
    guest = Ring(memory, pfns, out_pages, Role.GUEST, initialize=True)
    return guest, Ring(memory, pfns, out_pages, Role.HOST)


def word(ring: Ring, sending: bool, offset: int) -> int:
    """Returns a field of the header of the ring that ``ring`` sends into, or of the other one."""
    return int.from_bytes(ring.pages(sending)[offset : offset + 4], "little")


def set_word(ring: Ring, sending: bool, offset: int, value: int) -> None:
    """Overwrites such a field, as a peer that lies would."""
    ring.pages(sending)[offset : offset + 4] = value.to_bytes(4, "little")


def raw_packet(
    kind: int,
    payload: bytes = b"",
    *,
    header: bytes = b"",
    transaction_id: int = 1,
    flags: int = 1,
    offset8: int | None = None,
    len8: int | None = None,
) -> bytes:
    """Returns a packet with its trailer, as bytes; ``offset8`` and ``len8`` may lie."""
    offset = 16 + align8(len(header))
    length = offset + align8(len(payload))
    descriptor = Descriptor(
        kind,
        offset // 8 if offset8 is None else offset8,
        length // 8 if len8 is None else len8,
        flags,
        transaction_id,
    )
    body = (pack_descriptor(descriptor) + header).ljust(offset, b"\0")
    return body + payload.ljust(length - offset, b"\0") + bytes(8)
