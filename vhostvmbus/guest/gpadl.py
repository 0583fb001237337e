# SPDX-License-Identifier: GPL-2.0-or-later
"""A GPADL as the software guest keeps it, and what pages one may be made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vhostvmbus.guest.ram import GuestRam
from vhostvmbus.wire.gpa import GpaRange


@dataclass(frozen=True, slots=True)
class GuestGpadl:
    """A GPADL that exists."""

    gpadl_id: int
    channel: int
    ranges: tuple[GpaRange, ...]
    owned_pfns: tuple[int, ...] = ()
    """Pages that the guest allocated for it and gives back with it."""


def pages_of(
    ram: GuestRam, pages: Sequence[int] | int | Sequence[GpaRange]
) -> tuple[tuple[GpaRange, ...], tuple[int, ...]]:
    """Returns ranges that describe ``pages``, and the PFNs among them that were allocated here.

    ``pages`` are PFNs, a number of pages to allocate, or ranges.
    """
    if isinstance(pages, int):
        owned = tuple(ram.alloc_pages(pages))
        return (GpaRange.of_pages(owned),), owned
    if pages and isinstance(pages[0], GpaRange):
        return tuple(item for item in pages if isinstance(item, GpaRange)), ()
    return (GpaRange.of_pages([pfn for pfn in pages if isinstance(pfn, int)]),), ()
