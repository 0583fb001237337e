# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices for the tests of the guest's half: they do what the guest's packets ask for.

A request is a JSON object in the in-band bytes, whose member ``op`` names a method of
:class:`Obedient`; so is the answer. Raw bytes, when they matter, follow a NUL.
"""

import hashlib
import json
import threading
import time
from typing import Any
from uuid import UUID

from vhostvmbus.device import Channel, Device, NtStatus, Packet, RefuseOpen

CHUNK = 1 << 20


def pattern(seed: int, size: int) -> bytes:
    """Bytes that both sides can make."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(size)


def digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


class Obedient(Device):
    """Every operation takes the request and the packet; a dictionary is the answer."""

    class_id = UUID("b7f2a6d1-0c35-4e8e-9f53-7b1d2a90c4e6")
    user_defined = bytes(range(120))
    max_external_data = 1 << 30
    max_external_ranges = 1 << 16
    transaction_quota = 1 << 14

    def __init__(self) -> None:
        self._held: dict[int, Packet] = {}
        self._forgotten: list[Packet] = []
        self._pushed: list[str] = []
        self._push_done = threading.Event()
        self.opens = self.closes = 0
        self.user_data = b""

    def opened(self, channel: Channel) -> None:
        self.opens += 1
        self.user_data = channel.user_data

    def suspended(self, channel: Channel) -> None:
        """Ends what is outstanding, as it should, except what is to be forgotten."""
        for packet in [p for p in self._held.values() if p not in self._forgotten]:
            packet.complete(b"suspended")

    def closed(self, channel: Channel) -> None:
        self.closes += 1
        self._held.clear()
        self._forgotten.clear()

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        text, _, raw = packet.payload.partition(b"\0")
        request = json.loads(text)
        request["raw"] = raw
        answer = getattr(self, "do_" + request["op"])(request, packet)
        if answer is not None:
            answer["id"] = packet.transaction_id
            packet.complete(json.dumps(answer).encode())

    def do_nothing(self, request: dict[str, Any], packet: Packet) -> None:
        packet.complete()

    def do_nap(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        """Takes nothing from the ring for a while."""
        time.sleep(request["seconds"])
        return {}

    def do_digest(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        external = packet.external_data
        assert external is not None
        ranges = [(r.byte_count, r.byte_offset, len(r.pfns)) for r in external.ranges[:64]]
        distinct = len({pfn for r in external.ranges[:64] for pfn in r.pfns})
        data = external.read()
        return {"sha256": digest(data), "length": len(data), "ranges": ranges, "pfns": distinct}

    def do_chunks(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        """The distinct digests of each CHUNK bytes, in the order of their first appearance."""
        external = packet.external_data
        assert external is not None
        found: dict[str, int] = {}
        for offset in range(0, len(external), CHUNK):
            name = digest(external.read(offset, min(CHUNK, len(external) - offset)))
            found[name] = found.get(name, 0) + 1
        return {"chunks": found, "length": len(external)}

    def do_fill(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        external = packet.external_data
        assert external is not None
        external.write(pattern(request["seed"], len(external)))
        return {"length": len(external)}

    def do_flip(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        """Turns the order of all bytes round."""
        external = packet.external_data
        assert external is not None
        data = external.read()
        external.write(data[::-1])
        return {"sha256": digest(data)}

    def do_raw(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        raw = request["raw"][: request["size"]]
        return {"sha256": digest(raw), "payload": len(packet.payload)}

    def do_reply(self, request: dict[str, Any], packet: Packet) -> None:
        packet.complete(pattern(request["size"], request["size"]))

    def do_hold(self, request: dict[str, Any], packet: Packet) -> None:
        self._held[request["key"]] = packet
        if request.get("forgotten"):
            self._forgotten.append(packet)

    def do_release(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        for key in request["keys"]:
            held = self._held.pop(key)
            held.complete(json.dumps({"key": key, "id": held.transaction_id}).encode())
        return {"held": len(self._held)}

    def do_counts(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        return {
            "opens": self.opens,
            "closes": self.closes,
            "user_data": self.user_data.hex(),
            "errors": dict(packet.channel.stats.as_dict()["errors"]),
        }

    def do_push(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        """Sends packets; from a thread of its own, as the guest may be slow to take them."""
        count, size = request["count"], request["size"]
        self._pushed.clear()
        self._push_done.clear()

        def completed(data: bytes | None) -> None:
            self._pushed.append("closed" if data is None else digest(data))
            if len(self._pushed) == count:
                self._push_done.set()

        def push() -> None:
            for index in range(count):
                packet.channel.send(pattern(index, size), on_completion=completed)

        threading.Thread(target=push, daemon=True).start()
        return {}

    def do_pushed(self, request: dict[str, Any], packet: Packet) -> dict[str, Any] | None:
        """What the completions of the pushed packets held, once all are there."""

        def answer() -> None:
            done = self._push_done.wait(20)
            text = "".join(self._pushed).encode()
            packet.complete(json.dumps({"done": done, "sha256": digest(text)}).encode())

        threading.Thread(target=answer, daemon=True).start()
        return None

    def do_gpadl(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        """Turns the bytes of a GPADL round."""
        mapping = packet.channel.map_gpadl(request["handle"])
        try:
            data = mapping.read()
            mapping.write(data[::-1])
        finally:
            packet.channel.unmap_gpadl(request["handle"])
        return {"sha256": digest(data), "length": len(data)}

    def do_leave(self, request: dict[str, Any], packet: Packet) -> None:
        """Takes itself away from the guest, for some seconds. This packet is not answered."""
        self.rescind()
        threading.Timer(request["seconds"], self.offer_again).start()

    def do_map(self, request: dict[str, Any], packet: Packet) -> dict[str, Any]:
        """Maps a GPADL and keeps it mapped."""
        packet.channel.map_gpadl(request["handle"])
        return {}


class Refusing(Device):
    """Refuses to be opened."""

    class_id = UUID("0d8a5a4e-93a5-4d59-a3e7-8f6f1f5b7c02")

    def opened(self, channel: Channel) -> None:
        raise RefuseOpen(NtStatus.ACCESS_DENIED)
