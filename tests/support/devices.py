# SPDX-License-Identifier: GPL-2.0-or-later
"""Small devices for tests that have a guest."""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

from vhostvmbus.device import Channel, Device, NtStatus, Packet, PacketError, RefuseOpen

CLASS_ID = UUID("c376c1c3-d276-48d2-90a9-c04748072c60")


class TestDevice(Device):
    """Notes its callbacks, and does with packets what the test says: by default, echoes them."""

    __test__ = False
    class_id = CLASS_ID
    name = "test"

    def __init__(self, on_packet: Callable[[Channel, Any], None] | None = None) -> None:
        self.events: list[str] = []
        self.on_packet = on_packet

    def opened(self, channel: Channel) -> None:
        self.events.append("opened")

    def resumed(self, channel: Channel) -> None:
        self.events.append("resumed")

    def started(self, channel: Channel) -> None:
        self.events.append("started")

    def suspended(self, channel: Channel) -> None:
        self.events.append("suspended")

    def closed(self, channel: Channel) -> None:
        self.events.append("closed")

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        if self.on_packet is not None:
            self.on_packet(channel, packet)
        else:
            packet.complete(packet.payload)


class Noting(Device):
    """Writes down its callbacks."""

    class_id = CLASS_ID

    def __init__(self) -> None:
        self.events: list[str] = []
        self.opened_channels: list[Channel] = []

    def opened(self, channel: Channel) -> None:
        self.events.append(f"opened {channel.index}")
        self.opened_channels.append(channel)

    def resumed(self, channel: Channel) -> None:
        self.events.append(f"resumed {channel.index}")

    def suspended(self, channel: Channel) -> None:
        self.events.append(f"suspended {channel.index}")

    def closed(self, channel: Channel) -> None:
        self.events.append(f"closed {channel.index}")


class Echo(Noting):
    """Completes each packet with its own payload."""

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        packet.complete(packet.payload)


class GatheringEcho(Echo):
    """The same, with completions published together."""

    gather_completions = True
    channels = 2
    max_channels = 3


class Digest(Noting):
    """Completes with the SHA-256 of the external data."""

    max_external_data = 64 << 20
    REJECTED = b"rejected"
    """The answer to malformed external data."""

    def __init__(self) -> None:
        super().__init__()
        self.rejections: list[PacketError] = []

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        digest = hashlib.sha256()
        if packet.external_data is not None:
            for view in packet.external_data.views():
                digest.update(view)
        packet.complete(digest.digest())

    def packet_rejected(self, channel: Channel, packet: Packet, error: PacketError) -> None:
        self.rejections.append(error)
        packet.complete(self.REJECTED)


class Fill(Noting):
    """Fills the external data with :func:`pattern` of the payload's seed.

    Payload: ``seed u64``.
    """

    max_external_data = 64 << 20

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        (seed,) = struct.unpack_from("<Q", packet.payload)
        data = packet.external_data
        if data is not None:
            data.write(pattern(seed, len(data)))
        packet.complete()


def pattern(seed: int, size: int) -> bytes:
    """Returns bytes that differ everywhere and by seed."""
    return hashlib.shake_128(struct.pack("<Q", seed)).digest(size)


class Touch(Noting):
    """Writes one part of the external data only.

    Payload: ``offset u32, length u32``.
    """

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        offset, length = struct.unpack_from("<II", packet.payload)
        assert packet.external_data is not None
        if length:
            packet.external_data.write(b"\x90" * length, offset)
        packet.complete(b"written.")


class Backwards(Noting):
    """Completes each group of packets in the opposite order; payload: ``more u64``."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Packet] = []

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        self.held.append(packet)
        (more,) = struct.unpack_from("<Q", packet.payload)
        if not more:
            threading.Thread(target=self.complete_all).start()

    def complete_all(self) -> None:
        held, self.held = self.held, []
        for packet in reversed(held):
            packet.complete(packet.payload)


class Silent(Noting):
    """Keeps every packet; the test completes them."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: list[Packet] = []
        self.arrived = threading.Semaphore(0)

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        self.packets.append(packet)
        self.arrived.release()


class Refusing(Noting):
    """Refuses the first opening with a status of its own."""

    def opened(self, channel: Channel) -> None:
        super().opened(channel)
        if len(self.opened_channels) == 1:
            raise RefuseOpen(NtStatus.DEVICE_NOT_READY)


class HostPush(Noting):
    """Sends ``count`` packets when the channel starts, and keeps what comes back."""

    def __init__(self, count: int = 1) -> None:
        super().__init__()
        self.count = count
        self.answers: list[bytes | None] = []
        self.answered = threading.Semaphore(0)

    def started(self, channel: Channel) -> None:
        for number in range(self.count):
            channel.send(struct.pack("<Q", number), on_completion=self._answer)

    def _answer(self, payload: bytes | None) -> None:
        self.answers.append(payload)
        self.answered.release()


class GpadlDigest(Noting):
    """Completes with the SHA-256 of a GPADL's pages.

    Payload: ``gpadl_id u64``.
    """

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        (handle,) = struct.unpack_from("<Q", packet.payload)
        mapping = channel.map_gpadl(handle)
        digest = hashlib.sha256()
        for view in mapping.views():
            digest.update(view)
        channel.unmap_gpadl(handle)
        packet.complete(digest.digest())
