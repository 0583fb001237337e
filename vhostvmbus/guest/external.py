# SPDX-License-Identifier: GPL-2.0-or-later
"""Turns page lists, as KMCL's client endpoint does, into a packet's GPA ranges, or refuses them.

``VmbPacketSendWithExternalPfns`` describes whole pages by their numbers,
``VmbPacketSendWithExternalMdl`` a chain of buffers, each with an offset into its first page and a
length; a :class:`GpaRange` is what such a buffer (an MDL) is here.  Nothing here sends; every
refusal is a :class:`SendRefused`, with the status that the function returns.
"""

from __future__ import annotations

from collections.abc import Sequence

from vhostvmbus.guest.errors import SendRefused
from vhostvmbus.wire.gpa import GpaRange, pfn_count
from vhostvmbus.wire.vmbus import PAGE_SIZE

_U32 = 1 << 32
_U64 = 1 << 64


def require_completion(wait_for_completion: bool) -> None:
    """Refuses a send without WAIT_FOR_COMPLETION: the pages are the host's until it completes."""
    if not wait_for_completion:
        raise SendRefused("external data cannot be sent without WAIT_FOR_COMPLETION")


def range_of_pfns(
    pfns: Sequence[int],
    pfn_offset: int = 0,
    pfn_length: int | None = None,
    byte_offset: int = 0,
    byte_count: int | None = None,
) -> GpaRange:
    """Returns one range: ``pfn_length`` pages from ``pfns[pfn_offset]`` on.

    It starts ``byte_offset`` bytes into the first page and has ``byte_count`` bytes; by default it
    ends with the last page, so that PFNs alone describe whole pages.
    """
    end = len(pfns) if pfn_length is None else pfn_offset + pfn_length
    if pfn_offset < 0 or pfn_offset >= end or end > len(pfns):
        raise SendRefused(f"PFNs {pfn_offset} to {end} of {len(pfns)}")
    chosen = pfns[pfn_offset:end]
    if byte_count is None:
        byte_count = len(chosen) * PAGE_SIZE - byte_offset
    return GpaRange(byte_count, byte_offset, chosen)


def ranges_of_chain(
    chain: Sequence[GpaRange], offset: int = 0, length: int = 0, force_length: bool = False
) -> list[GpaRange]:
    """Returns ``length`` bytes from ``offset`` on in the buffers of ``chain``, as one stretch.

    ``length`` 0 means all that follows.  With ``force_length`` (FORCE_MDL_LENGTH) only the first
    buffer counts, and ``length`` may exceed what it says it has, up to the end of its last page.
    """
    check_ranges(chain)
    if offset < 0 or length < 0:
        raise SendRefused(f"{length} bytes at {offset}")
    if force_length:
        first = chain[0]
        room = len(first.pfns) * PAGE_SIZE - first.byte_offset
        wanted = length or first.byte_count - offset
        if wanted < 1 or offset + wanted > room:
            raise SendRefused(f"{wanted} bytes at {offset}: the first buffer's pages hold {room}")
        return [_part(first, offset, wanted)]
    total = sum(item.byte_count for item in chain)
    wanted = length or total - offset
    if wanted < 1 or offset + wanted > total:
        raise SendRefused(f"{wanted} bytes at {offset} of {total}")
    ranges = []
    for item in chain:
        taken = min(wanted, item.byte_count - offset)
        if taken > 0:
            ranges.append(_part(item, offset, taken))
            wanted -= taken
        offset = max(0, offset - item.byte_count)
    return ranges


def _part(item: GpaRange, offset: int, length: int) -> GpaRange:
    page, byte_offset = divmod(item.byte_offset + offset, PAGE_SIZE)
    return GpaRange(length, byte_offset, item.pfns[page : page + pfn_count(byte_offset, length)])


def check_ranges(ranges: Sequence[GpaRange]) -> None:
    """Refuses ranges whose bytes and pages do not go together, or that a packet cannot say.

    Whether a PFN is memory is the host's to find out.
    """
    if not ranges:
        raise SendRefused("external data without a range")
    for item in ranges:
        if (
            not 1 <= item.byte_count < _U32
            or not 0 <= item.byte_offset < _U32
            or pfn_count(item.byte_offset, item.byte_count) != len(item.pfns)
        ):
            raise SendRefused(
                f"{item.byte_count} bytes from {item.byte_offset} do not take "
                f"{len(item.pfns)} pages"
            )
        if not all(0 <= pfn < _U64 for pfn in item.pfns):
            raise SendRefused("a PFN that has no 64 bits")
