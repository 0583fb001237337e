# SPDX-License-Identifier: GPL-2.0-or-later
"""Decides what the card answers to each message of its guest: NVSP and RNDIS, without any I/O.

It takes bytes and returns an :data:`Action`, which says what is to be done and what the packet is
completed with. RNDIS requests go through :meth:`Protocol.control`, whose answers are packets of the
host's own. Sources: see :mod:`.nvsp`, :mod:`.rndis` and :mod:`.oids`.

Invariants: every message gets one action, whatever is in it; one that is refused changed nothing.
Only the primary channel negotiates; a subchannel has nothing but RNDIS data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, assert_never

from vhostvmbus.devices.net import buffers, nvsp, offloads, oids, rndis, status
from vhostvmbus.devices.net.errors import NetError, NvspError, OidError, RndisError
from vhostvmbus.devices.net.nvsp import Capability, MessageType, Status, Version
from vhostvmbus.devices.net.oids import ETHERNET_SIZE, VLAN_SIZE, Adapter, Change
from vhostvmbus.engine import lib

MAX_FRAME: Final[int] = lib.VVB_NET_LONGEST_IP
"""The longest ``frame_size`` of an NDIS configuration that is believed. One that cannot be, 0 above
all, which a driver sends that has nothing to say, stands for the ordinary one.
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """An action: complete the packet with ``payload``; ``error`` is what was wrong with it."""

    payload: bytes
    error: NetError | None = None


@dataclass(frozen=True, slots=True)
class Lend:
    """An action: map this GPADL and complete with :meth:`Protocol.lent`."""

    receive: bool
    gpadl: int
    buffer_id: int


@dataclass(frozen=True, slots=True)
class Revoke:
    """An action: touch that buffer no more, then complete with an empty payload."""

    receive: bool


@dataclass(frozen=True, slots=True)
class OfferSubchannels:
    """An action: offer so many subchannels, then complete with :func:`subchannels_answer`.

    The order matters: Linux waits for ever for channels that were promised, and takes those that
    come early.
    """

    count: int


Action = Answer | Lend | Revoke | OfferSubchannels


class Rndis(Enum):
    """A stage of the RNDIS conversation."""

    UNINITIALIZED = auto()
    INITIALIZED = auto()


@dataclass(slots=True)
class Outcome:
    """The effect of a control message: RNDIS messages to send, and what changed."""

    messages: list[bytes] = field(default_factory=list)
    change: Change = Change.NOTHING
    error: NetError | None = None
    reset: bool = False
    """Set if everything that was set is as in the beginning."""


class Protocol:
    """One guest's conversation with the card, on the primary channel."""

    def __init__(self, adapter: Adapter, *, max_subchannels: int = 0) -> None:
        self.adapter = adapter
        self.max_subchannels = max_subchannels
        self.version: Version | None = None
        self.message_size = nvsp.MESSAGE_SIZE
        """The bytes of every NVSP message to the guest; the most as long as nobody knows."""
        self.capabilities = Capability(0)
        adapter.guest_mtu = oids.DEFAULT_MTU
        self.frame_size = adapter.guest_mtu + ETHERNET_SIZE
        """The longest frame that the guest takes, in bytes, without a tag."""
        self.ndis_version = (0, 0)
        self.rndis = Rndis.UNINITIALIZED
        self.receive_lent = False
        self.send_lent = False

    @property
    def coalescing(self) -> bool:
        """Tells whether the guest takes a frame in several sections."""
        version = self.version
        return (
            version is not None
            and version >= Version.V6_1
            and bool(self.capabilities & Capability.RSC)
        )

    @property
    def singly(self) -> bool:
        """Tells whether each frame goes to the guest in a packet of its own.

        Version 1 is what boot programs speak, and iPXE takes the frames of a packet in reverse.
        """
        return self.version is Version.V1

    @property
    def tagging(self) -> bool:
        """Tells whether the guest takes an 802.1Q tag beside the frame."""
        return bool(self.capabilities & Capability.IEEE8021Q)

    @property
    def ready(self) -> bool:
        """Tells whether RNDIS messages may be sent to the guest."""
        return self.receive_lent and self.rndis is Rndis.INITIALIZED

    # -- NVSP ----------------------------------------------------------------------------------

    def receive(self, payload: bytes, *, primary: bool = True) -> Action:
        """Returns what is to be done with a packet. Never raises.

        It must not be an RNDIS packet, in a version that has those.
        """
        try:
            message = nvsp.decode(payload, self.version or 0)
            if not primary:
                raise NvspError("msg_type", payload[0], 0, "on a subchannel")
            return self._act(message)
        except NvspError as error:
            return Answer(_refusal(payload), error)

    def _act(self, message: nvsp.Message) -> Action:
        match message:
            case nvsp.Init():
                return self._init(message)
            case nvsp.NdisVersion(major, minor):
                self.ndis_version = (major, minor)
                return Answer(b"")
            case nvsp.NdisConfig(frame_size, capabilities):
                return self._configure(frame_size, capabilities)
            case nvsp.SendBuffer(receive, gpadl, buffer_id):
                if self.receive_lent if receive else self.send_lent:
                    raise NvspError("gpadl_handle", gpadl, 4, "a second buffer")
                return Lend(receive, gpadl, buffer_id)
            case nvsp.RevokeBuffer(receive, _):
                if receive:
                    self.receive_lent = False
                else:
                    self.send_lent = False
                return Revoke(receive)
            case nvsp.SwitchDataPath(active):
                if active:
                    raise NvspError("active_datapath", active, 4, "there is no virtual function")
                return Answer(b"")
            case nvsp.Subchannels(operation, count):
                return self._subchannels(operation, count)
            case nvsp.PacketDirect(operation):
                return Answer(nvsp.packet_direct_complete(operation))
            case nvsp.RndisPacketComplete():
                raise NvspError(
                    "msg_type", MessageType.SEND_RNDIS_PACKET_COMPLETE, 0, "in a packet"
                )
            case nvsp.OidQueryEx():
                return Answer(nvsp.oid_query_ex_complete())
            case _:
                assert_never(message)

    def _init(self, message: nvsp.Init) -> Action:
        if self.receive_lent or self.send_lent:
            raise NvspError("msg_type", MessageType.INIT, 0, "while buffers are lent")
        answer, version = nvsp.negotiate(message)
        self.version = version
        self.message_size = nvsp.message_size(version or 0)
        self.capabilities = Capability(0)
        return Answer(nvsp.init_complete(answer, version or 0))

    def _configure(self, frame_size: int, capabilities: Capability) -> Action:
        if self.receive_lent:
            raise NvspError("msg_type", MessageType.SEND_NDIS_CONFIG, 0, "after the buffers")
        if not ETHERNET_SIZE + oids.MIN_MTU <= frame_size <= MAX_FRAME:
            frame_size = oids.DEFAULT_MTU + ETHERNET_SIZE
        self.frame_size = frame_size
        self.capabilities = capabilities
        self.adapter.coalescing = self.coalescing
        self.adapter.guest_mtu = frame_size - ETHERNET_SIZE
        return Answer(b"")

    def _subchannels(self, operation: int, count: int) -> Action:
        if operation != 1:
            raise NvspError("op", operation, 4)
        if not count:
            raise NvspError("num_subchannels", count, 8)
        granted = min(count, self.max_subchannels)
        if not granted:
            return Answer(subchannels_answer(0))
        return OfferSubchannels(granted)

    @property
    def section_size(self) -> int:
        """The bytes of a receive section for this guest."""
        return buffers.section_size(self.frame_size + VLAN_SIZE, self.coalescing)

    def lent(self, buffer: buffers.ReceiveBuffer | buffers.SendBuffer) -> bytes:
        """Uses the buffer that :class:`Lend` asked for, now mapped. Returns what completes the
        packet.
        """
        if isinstance(buffer, buffers.ReceiveBuffer):
            self.receive_lent = True
            return nvsp.receive_buffer_complete(Status.SUCCESS, buffer.section_size, buffer.count)
        self.send_lent = True
        return nvsp.send_buffer_complete(Status.SUCCESS, buffer.section_size)

    # -- RNDIS requests ------------------------------------------------------------------------

    def control(self, data: bytes, max_transfer_size: int) -> Outcome:
        """Answers one RNDIS request; ``data`` is private memory. Never raises."""
        try:
            message = rndis.decode_control(data)
        except RndisError as error:
            return Outcome(error=error)
        ready = self.rndis is Rndis.INITIALIZED
        not_ready = None if ready else RndisError("ndis_msg_type", data[0], 0, "not initialized")
        match message:
            case rndis.Initialize(number, major):
                return self._initialize(number, major, max_transfer_size)
            case rndis.Halt():
                self.rndis = Rndis.UNINITIALIZED
                self.adapter.halt()
                return Outcome()
            case rndis.Reset():
                if ready:
                    self.adapter.reset()
                answer = rndis.reset_complete(
                    status.SUCCESS if ready else status.ADAPTER_NOT_READY, ready
                )
                return Outcome([answer], error=not_ready, reset=ready)
            case rndis.Keepalive(number):
                code = status.SUCCESS if ready else status.ADAPTER_NOT_READY
                return Outcome([rndis.keepalive_complete(number, code)], error=not_ready)
            case rndis.Query(number) if not ready:
                return Outcome(
                    [rndis.query_complete(number, status.ADAPTER_NOT_READY)], error=not_ready
                )
            case rndis.Query(number, oid, information):
                return self._query(number, oid, information)
            case rndis.Set(number) if not ready:
                return Outcome(
                    [rndis.set_complete(number, status.ADAPTER_NOT_READY)], error=not_ready
                )
            case rndis.Set(number, oid, information):
                return self._set(number, oid, information)
            case _:
                assert_never(message)

    def _initialize(self, number: int, major: int, max_transfer_size: int) -> Outcome:
        if major != rndis.MAJOR_VERSION:
            error = RndisError("major_ver", major, 12)
            answer = rndis.initialize_complete(number, status.BAD_VERSION, max_transfer_size)
            return Outcome([answer], error=error)
        self.rndis = Rndis.INITIALIZED
        self.adapter.reset()
        answer = rndis.initialize_complete(number, status.SUCCESS, max_transfer_size)
        return Outcome([answer], reset=True)

    def _query(self, number: int, oid: int, information: bytes) -> Outcome:
        try:
            value = oids.query(self.adapter, oid, information)
        except OidError as error:
            return Outcome([rndis.query_complete(number, error.rndis_status)], error=error)
        return Outcome([rndis.query_complete(number, status.SUCCESS, value)])

    def _set(self, number: int, oid: int, information: bytes) -> Outcome:
        try:
            change = oids.set_value(self.adapter, oid, information)
        except OidError as error:
            return Outcome([rndis.set_complete(number, error.rndis_status)], error=error)
        messages = [rndis.set_complete(number, status.SUCCESS)]
        if Change.INDICATION in change:
            now = offloads.describe(self.adapter.offloads, max(offloads.SIZES))
            messages.append(rndis.indicate_status(status.TASK_OFFLOAD_CURRENT_CONFIG, now))
        return Outcome(messages, change)

    def link_changed(self, connected: bool) -> list[bytes]:
        """Returns the messages that tell the guest that its link went up or down; none if it did
        not.
        """
        if self.adapter.connected == connected:
            return []
        self.adapter.connected = connected
        if self.rndis is not Rndis.INITIALIZED:
            return []
        code = status.MEDIA_CONNECT if connected else status.MEDIA_DISCONNECT
        return [rndis.indicate_status(code)]


def refused_buffer(receive: bool) -> bytes:
    """Returns what completes a buffer that was not taken."""
    if receive:
        return nvsp.receive_buffer_complete(Status.FAIL)
    return nvsp.send_buffer_complete(Status.FAIL)


def subchannels_answer(count: int) -> bytes:
    """Returns what completes a request for subchannels of which ``count`` were offered."""
    return nvsp.subchannels_complete(Status.SUCCESS if count else Status.FAIL, count)


def _refusal(payload: bytes) -> bytes:
    """Returns a completion that a driver understands as a failure of what it asked for."""
    kind = int.from_bytes(payload[:4], "little")
    match kind:
        case MessageType.INIT:
            return nvsp.init_complete(Status.FAIL, 0)
        case MessageType.SEND_RECEIVE_BUFFER | MessageType.SEND_SEND_BUFFER:
            return refused_buffer(kind == MessageType.SEND_RECEIVE_BUFFER)
        case MessageType.SEND_RNDIS_PACKET:
            return nvsp.rndis_packet_complete(Status.FAIL)
        case MessageType.SUBCHANNEL:
            return nvsp.subchannels_complete(Status.FAIL, 0)
        case _:
            return b""
