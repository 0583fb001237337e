# SPDX-License-Identifier: GPL-2.0-or-later
"""The state machine of one storage channel: vstor packets in, actions out, no I/O.

Sequence, as Linux's ``storvsc_channel_init`` performs it::

    BEGIN_INITIALIZATION, QUERY_PROTOCOL_VERSION (repeated until one is accepted),
    QUERY_PROPERTIES, END_INITIALIZATION, then EXECUTE_SRB and the resets

CREATE_SUB_CHANNELS comes after END_INITIALIZATION (Linux) or before it (Windows).
BEGIN_INITIALIZATION starts over from any state: a guest that crashed and came up again (kexec)
sends it on a channel that still looks initialized.

Invariant: :meth:`Session.receive` accepts any bytes, never raises, and says for each packet
exactly one thing to do.  A malformed packet changes no state.  Once a version is agreed upon, every
packet from here has exactly that version's length, whatever the guest's had.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from vhostvmbus.devices.scsi import storvsp
from vhostvmbus.devices.scsi.storvsp import MalformedPacket, Operation, Srb, SrbStatus, Version
from vhostvmbus.wire.ntstatus import NtStatus


class State(Enum):
    """A stage of the guest's initialization."""

    CLOSED = auto()
    VERSION = auto()
    PROPERTIES = auto()
    END = auto()
    READY = auto()


@dataclass(slots=True)
class Answer:
    """Complete the packet with ``payload``; nothing else to do."""

    payload: bytes
    error: MalformedPacket | None = None
    """The reason that the packet was refused, if it was malformed."""


@dataclass(slots=True)
class Execute:
    """Carry out ``srb`` and complete the packet with an ``srb.answer(...)``."""

    srb: Srb


@dataclass(slots=True)
class Reset:
    """Complete with ``payload`` once every request taken before this one is completed.

    ``operation`` is RESET_BUS, RESET_ADAPTER or RESET_LUN; the address matters for the last.
    """

    operation: Operation
    path: int
    target: int
    lun: int
    payload: bytes


@dataclass(slots=True)
class CreateSubChannels:
    """Offer ``count`` subchannels, then complete with ``payload``."""

    count: int
    payload: bytes


Action = Answer | Execute | Reset | CreateSubChannels

_BOTH = (storvsp.SHORT_PACKET_SIZE, storvsp.PACKET_SIZE)
_RESETS = {Operation.RESET_BUS, Operation.RESET_ADAPTER, Operation.RESET_LUN}


class Session:
    """One channel's negotiation.  A subchannel starts ready, with its primary's version."""

    def __init__(
        self,
        *,
        max_transfer_bytes: int,
        max_sub_channels: int = 0,
        max_version: Version = Version.V6_2,
        version: Version | None = None,
    ) -> None:
        """Begins the negotiation of a channel, or with ``version`` the session of a subchannel.

        Versions above ``max_version`` are declined.
        """
        self.max_transfer_bytes = max_transfer_bytes
        self.max_version = max_version
        self.max_sub_channels = max_sub_channels
        self.version = version
        """The accepted protocol version, ``None`` before there is one."""
        self.is_sub_channel = version is not None
        self.state = State.READY if version is not None else State.CLOSED
        self._packet_size = version.packet_size if version is not None else 0
        self._seen_size = storvsp.PACKET_SIZE

    @classmethod
    def resumed(
        cls,
        *,
        max_transfer_bytes: int,
        max_sub_channels: int = 0,
        max_version: Version = Version.V6_2,
    ) -> Session:
        """Returns the session of a guest that was initialized by an earlier back end.

        Which version it chose is not known; the length of each packet tells its layout.
        """
        session = cls(
            max_transfer_bytes=max_transfer_bytes,
            max_sub_channels=max_sub_channels,
            max_version=max_version,
        )
        session.state = State.READY
        session._packet_size = storvsp.SHORT_PACKET_SIZE
        return session

    @property
    def is_ready(self) -> bool:
        """Tells whether the guest has finished its initialization."""
        return self.state is State.READY

    @property
    def request_sizes(self) -> tuple[int, ...]:
        """The lengths of payload, in bytes, that a SCSI request has in this session's state."""
        if self.state is not State.READY:
            return ()
        return _BOTH if self.version is None else (self._packet_size,)

    @property
    def packet_size(self) -> int:
        """The length, in bytes, of what the host sends of its own accord."""
        return self._packet_size if self.version is not None else self._seen_size

    def answer(self, payload: bytes, status: int, body: bytes | None = None) -> bytes:
        """Returns the completion of a packet that is not read as a SCSI request."""
        size = self._packet_size if self.version is not None else 0
        return storvsp.answer_control(payload, status, body, size)

    def receive(self, payload: bytes) -> Action:
        """Returns what to do with one packet of the guest."""
        # The one common case first: everything below is start-up or error.
        if payload[:4] == storvsp.EXECUTE_SRB and self.state is State.READY:
            try:
                srb = self._srb(payload)
            except MalformedPacket as error:
                return Answer(self.answer(payload, error.status), error)
            if (
                srb.length >= storvsp.MIN_SRB_LENGTH
                and 0 < srb.cdb_length <= storvsp.MAX_CDB_LENGTH
                and srb.direction <= storvsp.DataDirection.UNKNOWN
            ):
                return Execute(srb)
            return self._bad_envelope(srb)
        try:
            return self._control(payload)
        except MalformedPacket as error:
            return Answer(self.answer(payload, error.status), error)

    def _srb(self, payload: bytes) -> Srb:
        if self.version is not None:
            return storvsp.decode_srb(payload, self._packet_size)
        # Of a guest that was initialized before we came only its packets tell.
        srb = storvsp.decode_srb(payload, self._packet_size, exact=False)
        self._seen_size = len(srb.raw)
        return srb

    def _bad_envelope(self, srb: Srb) -> Answer:
        """Refuses what no SCSI command can be blamed for."""
        if srb.length < storvsp.MIN_SRB_LENGTH:
            return self._bad_srb(srb, "length", srb.length, 12, SrbStatus.BAD_SRB_BLOCK_LENGTH)
        if srb.direction > storvsp.DataDirection.UNKNOWN:
            return self._bad_srb(srb, "data_in", srb.direction, 22, SrbStatus.INVALID_REQUEST)
        return self._bad_srb(srb, "cdb_length", srb.cdb_length, 20, SrbStatus.INVALID_REQUEST)

    @staticmethod
    def _bad_srb(srb: Srb, field: str, value: int, offset: int, code: SrbStatus) -> Answer:
        error = MalformedPacket(field, value, offset, NtStatus.INVALID_PARAMETER)
        return Answer(srb.answer(status=error.status, srb_status=code), error)

    def _control(self, payload: bytes) -> Action:
        operation, _, _ = storvsp.decode_header(payload)
        if self.is_sub_channel and operation not in _RESETS:
            return self._refuse(payload, operation, NtStatus.INVALID_DEVICE_STATE)
        match operation:
            case Operation.BEGIN_INITIALIZATION:
                self.state = State.VERSION
                self.version = None
                self._seen_size = storvsp.size_of(payload)
                return Answer(self.answer(payload, NtStatus.SUCCESS))
            case Operation.QUERY_PROTOCOL_VERSION:
                return self._query_version(payload)
            case Operation.QUERY_PROPERTIES if self.state is State.PROPERTIES:
                self.state = State.END
                assert self.version is not None  # or the state would be another
                body = storvsp.properties(self.version, self._sub_channels, self.max_transfer_bytes)
                return Answer(self.answer(payload, NtStatus.SUCCESS, body))
            case Operation.END_INITIALIZATION if self.state is State.END:
                self.state = State.READY
                return Answer(self.answer(payload, NtStatus.SUCCESS))
            case Operation.CREATE_SUB_CHANNELS if self.state in (State.END, State.READY):
                return self._create_sub_channels(payload)
            case Operation.FCHBA_DATA if self.state in (State.END, State.READY):
                # Fibre Channel names; this is a SCSI controller.
                return self._refuse(payload, operation, NtStatus.INVALID_DEVICE_REQUEST)
            case Operation.RESET_BUS | Operation.RESET_ADAPTER | Operation.RESET_LUN if (
                self.state is State.READY
            ):
                srb = self._srb(payload)
                done = self.answer(payload, NtStatus.SUCCESS)
                return Reset(Operation(operation), srb.path, srb.target, srb.lun, done)
            case (
                Operation.QUERY_PROPERTIES
                | Operation.END_INITIALIZATION
                | Operation.CREATE_SUB_CHANNELS
                | Operation.FCHBA_DATA
                | Operation.EXECUTE_SRB
                | Operation.RESET_BUS
                | Operation.RESET_ADAPTER
                | Operation.RESET_LUN
            ):
                return self._refuse(payload, operation, NtStatus.INVALID_DEVICE_STATE)
            case _:
                # Unknown, or one that only a host sends.
                return self._refuse(payload, operation, NtStatus.INVALID_DEVICE_REQUEST)

    def _refuse(self, payload: bytes, operation: int, status: NtStatus) -> Answer:
        error = MalformedPacket("operation", operation, 0, status)
        return Answer(self.answer(payload, status), error)

    def _query_version(self, payload: bytes) -> Action:
        if self.state is not State.VERSION:
            return self._refuse(
                payload, Operation.QUERY_PROTOCOL_VERSION, NtStatus.INVALID_DEVICE_STATE
            )
        wanted = storvsp.decode_u16(payload, "version")
        try:
            version = Version(wanted)
        except ValueError:
            version = None
        if version is None or version > self.max_version:
            # Not an error of the guest: it goes on to the next version on its list.
            return Answer(self.answer(payload, NtStatus.REVISION_MISMATCH))
        answer = Answer(self.answer(payload, NtStatus.SUCCESS))  # by its own length, still
        self.version = version
        self._packet_size = version.packet_size
        self.state = State.PROPERTIES
        return answer

    @property
    def _sub_channels(self) -> int:
        """The most subchannels that may be asked for; an older version knows none."""
        known = self.version is None or self.version.has_sub_channels
        return self.max_sub_channels if known else 0

    def _create_sub_channels(self, payload: bytes) -> Action:
        count = storvsp.decode_u16(payload, "sub_channel_count")
        if count > self._sub_channels:
            error = MalformedPacket("sub_channel_count", count, 12, NtStatus.INVALID_PARAMETER)
            return Answer(self.answer(payload, error.status), error)
        return CreateSubChannels(count, self.answer(payload, NtStatus.SUCCESS))
