# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest RAM. Regions, GPA to host address, external data, the map of translated code.

Implements *Guest memory* and *Translated code* of docs/vhost-user-vmbus.md. Invariants:

* The memory map is an immutable snapshot, replaced as a whole or not at all; a region is unmapped
  only when nothing refers to it.
* Only this room and ``ring`` touch mapped guest memory. The rooms above get :class:`ExternalData`.
* A page that vanishes (SIGBUS) costs an error, not the process.
"""

from vhostvmbus.memory.codemap import CodeMap
from vhostvmbus.memory.external import ExternalData
from vhostvmbus.memory.guest_memory import GuestMemory, Region, Span, wait_until_unused
from vhostvmbus.memory.written import WrittenMemory

__all__ = [
    "CodeMap",
    "ExternalData",
    "GuestMemory",
    "Region",
    "Span",
    "WrittenMemory",
    "wait_until_unused",
]
