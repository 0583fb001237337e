# SPDX-License-Identifier: GPL-2.0-or-later
"""The ring engine. C (cffi, API mode) for attach, receive, send; a thin Python wrapper.

Source of the protocol: the guest's ``include/linux/hyperv.h`` and ``drivers/hv/ring_buffer.c``; the
barriers and their pairs are named in ``ringbuf.h``. What a packet means is not known here.
"""

from vhostvmbus.ring.inflight import InflightRegion
from vhostvmbus.ring.plan import AnyPlan, Done, Number, Operation, Outgoing, Plan, Rule
from vhostvmbus.ring.results import Batch, PacketLimits, RawPacket, RingState, Sent, Served
from vhostvmbus.ring.ring import Ring, Role
from vhostvmbus.ring.waiting import signal, wait

__all__ = [
    "AnyPlan",
    "Batch",
    "Done",
    "InflightRegion",
    "Number",
    "Operation",
    "Outgoing",
    "PacketLimits",
    "Plan",
    "RawPacket",
    "Ring",
    "RingState",
    "Role",
    "Rule",
    "Sent",
    "Served",
    "signal",
    "wait",
]
