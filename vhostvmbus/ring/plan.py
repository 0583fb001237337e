# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans: which packets the engine does by itself, and what a batch of them left behind.

A plan is for a device whose common packet is a transfer between a file and the guest's pages. It
says nothing that the device's own code would not do: a packet that fits no rule exactly, or that
cannot be done whole, goes up as if there were no plan. See ``plan.c`` for the doing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vhostvmbus.engine import ffi, lib
from vhostvmbus.wire.vmbus import PacketType

if TYPE_CHECKING:
    from vhostvmbus._engine import (
        Pointer,
        c_uint8_t,
        vvb_batch,
        vvb_number,
        vvb_outgoing,
        vvb_plan,
        vvb_rule,
    )

PLAN_BYTES: int = lib.VVB_PLAN_BYTES
"""The longest payload that a rule can be about."""


class Operation(IntEnum):
    """Which way the bytes go."""

    READ = lib.VVB_PLAN_READ
    """File to guest."""
    WRITE = lib.VVB_PLAN_WRITE
    """Guest to file."""


class Number(NamedTuple):
    """An unsigned number in a payload: ``width`` bytes (1, 2, 4 or 8) at ``offset``.

    Its meaning is its value shifted left: ``shift=9`` for blocks of 512 bytes.
    """

    offset: int
    width: int
    big_endian: bool = False
    shift: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One kind of packet and what to do for it.

    Fits a packet with external data whose sender wants a completion, if its payload has
    ``payload_length`` bytes, ``payload & mask == value``, and the transfer, ``length`` bytes at
    ``position``, is not empty, at most ``max_length`` and no longer than the external data and
    ``room``, and ends at or before ``file_size``. Completed with ``payload & keep | set``, with the
    length at ``done``. The byte strings may be shorter than the payload: zeroes follow.
    """

    operation: Operation
    fd: int
    """Must stay open as long as a channel has the plan."""
    file_size: int
    max_length: int
    payload_length: int
    """A multiple of 8, as on the wire; at most :data:`PLAN_BYTES`."""
    mask: bytes
    value: bytes
    position: Number
    length: Number
    room: Number | None = None
    keep: bytes = b""
    set: bytes = b""
    done: Number | None = None
    nowait: bool = False
    """Do a READ only if the host has the data in memory (``RWF_NOWAIT``)."""


class AnyPlan(Protocol):
    """The interface of a plan for a ring: these rules, or a device's own in C."""

    @property
    def handle(self) -> "Pointer[vvb_plan]":
        """The engine's ``struct vvb_plan *``."""


class Plan:
    """Rules, compiled; the first that fits a packet counts.

    Raises :exc:`ValueError` if one makes no sense: a number outside the payload or of an odd
    width, a value outside its mask, a length that its field cannot hold.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        table = ffi.new("struct vvb_rule[]", len(rules))
        for entry, rule in zip(table, rules, strict=True):
            _fill(entry, rule)
        error = ffi.new("int *")
        handle = lib.vvb_plan_new(table, len(rules), error)
        if handle == ffi.NULL:
            if error[0] == 22:  # EINVAL
                raise ValueError("a rule of the plan makes no sense")
            raise MemoryError(os.strerror(error[0]))
        self._handle = ffi.gc(handle, lib.vvb_plan_free)

    @property
    def handle(self) -> "Pointer[vvb_plan]":
        """The engine's ``struct vvb_plan *``."""
        return self._handle


def _fill(entry: "vvb_rule", rule: Rule) -> None:
    try:
        entry.file_size, entry.max_length = rule.file_size, rule.max_length
        entry.fd, entry.payload_length = rule.fd, rule.payload_length
        entry.operation, entry.nowait = rule.operation, rule.nowait
        _fill_number(entry.position, rule.position)
        _fill_number(entry.length, rule.length)
        _fill_number(entry.room, rule.room)
        _fill_number(entry.done, rule.done)
    except OverflowError as error:
        raise ValueError(f"a number of the plan is out of range: {error}") from None
    for name, content, field in (
        ("mask", rule.mask, entry.mask),
        ("value", rule.value, entry.value),
        ("keep", rule.keep, entry.keep),
        ("set", rule.set, entry.set),
    ):
        if len(content) > PLAN_BYTES:
            raise ValueError(f"{name} has {len(content)} bytes, at most {PLAN_BYTES} are looked at")
        ffi.memmove(field, content, len(content))


def _fill_number(field: "vvb_number", number: Number | None) -> None:
    if number is not None:
        field.offset, field.width, field.big_endian, field.shift = number


class Outgoing(NamedTuple):
    """A packet on its way to the peer."""

    type: int
    payload: bytes
    transaction_id: int
    flags: int = 0
    header: bytes = b""
    slot: int = 0
    """The in-flight slot of the packet that this completes; 0 if it has none."""


class Done:
    """The work of a plan in one receive. The completions are still to be sent.

    Valid until the next receive of the same ring.
    """

    __slots__ = ("_batch", "completions", "external_bytes", "packets", "payload_bytes")

    def __init__(self, batch: "vvb_batch") -> None:
        self._batch = batch
        self.packets: int = batch.done_count
        """Packets done."""
        self.completions: int = batch.answer_count
        """Of them, those that are to be completed; the others were completions themselves."""
        self.payload_bytes: int = batch.done_payload
        self.external_bytes: int = batch.done_external

    @property
    def records(self) -> "tuple[Pointer[vvb_outgoing], int, Pointer[c_uint8_t], int]":
        """The completions as the engine's send takes them."""
        batch = self._batch
        return batch.outgoing, batch.answer_count, batch.answers, batch.answers_len

    def written(self) -> list[tuple[int, int]]:
        """Returns the guest memory that was written, as ``(gpa, length)``."""
        spans = self._batch.spans
        return [(spans[i].gpa, spans[i].len) for i in range(self._batch.span_count)]

    def outgoing(self, first: int) -> list[Outgoing]:
        """Returns the completions from number ``first`` on, as packets, for when they must wait."""
        batch = self._batch
        answers = bytes(ffi.buffer(batch.answers, batch.answers_len))
        packets, at = [], 0
        for i in range(batch.answer_count):
            record = batch.outgoing[i]
            payload = answers[at : at + record.payload_len]
            at += record.payload_len
            if i >= first:
                packets.append(
                    Outgoing(PacketType.COMP, payload, record.transaction_id, slot=record.slot)
                )
        return packets
