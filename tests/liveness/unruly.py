# SPDX-License-Identifier: GPL-2.0-or-later
"""A device that does what its guest tells it, however foolish: it is slow, blocks, raises, lies.

Each callback carries out a *program*, a list of words. Those of ``packet_received`` and
``packet_rejected`` are the packet's payload; those of the other callbacks of a channel are in the
user data of its opening, as ``callback:word word|callback:word``. So whoever drives the guest's end
drives the device as well, and a sequence of requests is all that there is to say.

A program that comes to ``block`` waits at the gate, which the harness opens: code of a channel that
has been closed goes on then, and tries to do what it must not any more.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

from vhostvmbus.device import Channel, Device, NtStatus, Packet, PacketError, RefuseOpen
from vhostvmbus.wire.errors import GuestError

log = logging.getLogger(__name__)

NAP = 0.02
"""Seconds that ``nap`` takes."""
MARK = 0xEE
"""The byte that programs write to the guest's memory."""


def gpadl_of(index: int) -> int:
    """Returns the number of the GPADL that channel ``index`` maps."""
    return 0x2000 + index


class Unlucky(Exception):
    """The exception of a device's code that nobody has thought of."""


class Gate:
    """The place where programs wait until they are let go, all at once."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: set[Program] = set()
        self._gone_on: set[Program] = set()
        self._removed = False

    def arrive(self, program: Program) -> Callable[[], bool]:
        """Has ``program`` wait here. Returns the test whether it may go on."""
        with self._changed:
            if not self._removed:
                self._waiting.add(program)
        return lambda: program not in self._waiting

    def wait(self, program: Program) -> None:
        """Waits until ``program`` may go on."""
        may_go = self.arrive(program)
        with self._changed:
            self._changed.wait_for(may_go)

    def open(self) -> None:
        """Lets all go that wait now."""
        with self._changed:
            self._gone_on |= self._waiting
            self._waiting.clear()
            self._changed.notify_all()

    def remove(self) -> None:
        """Lets all go that wait now, and all that come later."""
        self._removed = True
        self.open()

    def ended(self, program: Program) -> None:
        """Notes that ``program`` is at its end."""
        with self._changed:
            self._gone_on.discard(program)
            self._waiting.discard(program)
            self._changed.notify_all()

    def wait_ended(self, seconds: float) -> list[str]:
        """Waits until all that were let go have ended. Returns what has not after ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: not self._gone_on, seconds)
            return sorted(str(program) for program in self._gone_on)


class Program:
    """The words that one callback carries out, for one channel and perhaps a packet."""

    def __init__(
        self, device: Any, what: str, words: list[str], channel: Any, packet: Packet | None
    ) -> None:
        self.device = device
        self.what = what
        self.words = words
        self.channel = channel
        self.packet = packet
        self.kept: list[memoryview] = []

    def __str__(self) -> str:
        return f"{self.what}: {' '.join(self.words)}"

    def run(self, first: int = 0) -> None:
        """Carries the words out, from number ``first`` on; on this thread, or where they say."""
        for number, word in enumerate(self.words[first:], first):
            if word == "spawn":
                beside = Program(
                    self.device, self.what, self.words[number + 1 :], self.channel, self.packet
                )
                threading.Thread(target=beside.run_quietly, name=self.what, daemon=True).start()
                return
            if word == "defer":
                if self.packet is not None and not self.packet.deferred:
                    self.packet.defer()
                    return
            elif word == "block":
                self.device.gate.wait(self)
            else:
                getattr(self, f"do_{word}")()

    async def run_async(self) -> None:
        """Carries the words out on the device's event loop."""
        for number, word in enumerate(self.words):
            if word in ("nap", "slow"):
                await asyncio.sleep(NAP if word == "nap" else self.device.slowness)
            elif word == "block":
                may_go = self.device.gate.arrive(self)
                while not may_go():
                    await asyncio.sleep(0.005)
            elif word == "stubborn":
                may_go = self.device.gate.arrive(self)
                while not may_go():
                    try:
                        await asyncio.sleep(0.005)
                    except asyncio.CancelledError:
                        log.info("%s does not care", self)
            elif word == "defer":
                continue
            elif word == "spawn":
                self.run(number)
                return
            else:
                getattr(self, f"do_{word}")()

    def run_quietly(self) -> None:
        """Carries the words out on a thread of the device's own, which catches what they raise."""
        try:
            self.run()
        except (Exception, SystemExit) as error:
            log.info("%s: %s: %s", self, type(error).__name__, error)
        finally:
            self.device.gate.ended(self)

    # ---- time ----

    def do_nap(self) -> None:
        time.sleep(NAP)

    def do_slow(self) -> None:
        time.sleep(self.device.slowness)

    def do_stubborn(self) -> None:
        self.device.gate.wait(self)

    # ---- exceptions ----

    def do_raise(self) -> None:
        raise Unlucky(str(self))

    def do_guilty(self) -> None:
        raise GuestError("field", 1, 2, "the device says that it is the guest's mistake")

    def do_oserror(self) -> None:
        raise OSError(5, "the device's disk is broken")

    def do_exit(self) -> None:
        sys.exit("the device's code wants to end the program")

    def do_refuse(self) -> None:
        raise RefuseOpen(NtStatus.DEVICE_NOT_READY)

    # ---- the packet ----

    def do_complete(self) -> None:
        if self.packet is not None:
            self.packet.complete(self.packet.payload[:16])

    def do_twice(self) -> None:
        self.do_complete()
        self.do_complete()

    def do_fail(self) -> None:
        if self.packet is not None:
            self.packet.fail("the device does not like it")

    def do_hold(self) -> None:
        """Leaves the packet to itself; nobody will complete it."""

    def do_large(self) -> None:
        """Completes with more than small rings have room for."""
        if self.packet is not None:
            self.packet.complete(bytes(30_000))

    def do_huge(self) -> None:
        """Completes with more than any packet can have."""
        if self.packet is not None:
            self.packet.complete(bytes(0xFFFF * 8 + 8))

    def do_read(self) -> None:
        if self.packet is not None and self.packet.external_data is not None:
            self.packet.external_data.read()

    def do_write(self) -> None:
        if self.packet is not None and self.packet.external_data is not None:
            data = self.packet.external_data
            data.write(bytes([MARK]) * len(data))

    def do_fill(self) -> None:
        if self.packet is not None and self.packet.external_data is not None:
            self.packet.external_data.fill(MARK)

    def do_look(self) -> None:
        """Takes views of the guest's pages, and keeps them."""
        if self.packet is not None and self.packet.external_data is not None:
            self.kept += self.packet.external_data.views(writable=True)

    def do_scrawl(self) -> None:
        """Writes into the views that were kept."""
        for view in self.kept:
            view[:] = bytes([MARK]) * len(view)

    def do_load(self) -> None:
        """Reads the image into the guest's pages."""
        if self.packet is not None and self.packet.external_data is not None:
            self.packet.external_data.preadv(self.device.image, 0)

    def do_store(self) -> None:
        """Writes the guest's pages to the image."""
        if self.packet is not None and self.packet.external_data is not None:
            self.packet.external_data.pwritev(self.device.image, 0)

    def do_lend(self) -> None:
        """Lends the guest's pages to C, which takes a moment to give them back."""
        self._lend("nap")

    def do_lendblock(self) -> None:
        self._lend("block")

    def do_lendraise(self) -> None:
        self._lend("raise")

    def _lend(self, word: str) -> None:
        if self.packet is not None and self.packet.external_data is not None:
            self.packet.external_data.lend(lambda _: None, self._later("before_close", word))

    def _later(self, what: str, word: str) -> Callable[..., None]:
        """Returns a callback that carries out ``word``."""
        program = Program(self.device, what, [word], self.channel, None)

        def called(*_: object) -> None:
            try:
                program.run()
            finally:
                self.device.gate.ended(program)

        return called

    # ---- the channel ----

    def do_send(self) -> None:
        self.channel.send(b"of the host's own accord")

    def do_flood(self) -> None:
        for _ in range(200):
            self.channel.send(bytes(512))

    def do_ask(self) -> None:
        self._ask("nap")

    def do_askraise(self) -> None:
        self._ask("raise")

    def do_askblock(self) -> None:
        self._ask("block")

    def do_askexit(self) -> None:
        self._ask("exit")

    def _ask(self, word: str) -> None:
        self.channel.send(b"how are you?", on_completion=self._later("on_completion", word))

    def do_request(self) -> None:
        self.channel.request(b"request.", 0.2)

    def do_patient(self) -> None:
        """Waits for an answer as long as it takes."""
        self.channel.request(b"request.")

    def do_pause(self) -> None:
        """Pauses the channel for a moment, from a thread that may."""
        try:
            self.channel.pause(0.1)
        finally:
            self.channel.start()

    def do_quota(self) -> None:
        self.channel.transaction_quota = 3

    def do_note(self) -> None:
        self.channel.note = b"a note"

    def do_map(self) -> None:
        self.do_unmap()
        self.device.mapped[self.channel] = self.channel.map_gpadl(gpadl_of(self.channel.index))

    def do_unmap(self) -> None:
        if self.device.mapped.pop(self.channel, None) is not None:
            self.channel.unmap_gpadl(gpadl_of(self.channel.index))

    def do_smear(self) -> None:
        """Writes into the GPADL that is mapped."""
        for mapping in list(self.device.mapped.values()):
            mapping.fill(MARK)

    def do_ring(self) -> None:
        """Lends the ring to C, which takes a moment to give it back."""
        self._lend_ring("nap")

    def do_ringblock(self) -> None:
        self._lend_ring("block")

    def do_ringraise(self) -> None:
        self._lend_ring("raise")

    def _lend_ring(self, word: str) -> None:
        self.channel.lend_ring(self._later("before_detach", word))

    def do_stats(self) -> None:
        self.channel.as_dict()

    # ---- the device ----

    def do_offer(self) -> None:
        self.device.offer_channels(1)

    def do_rescind(self) -> None:
        self.device.rescind()

    def do_again(self) -> None:
        self.device.offer_again()


def parse_programs(user_data: bytes) -> dict[str, list[str]]:
    """Returns the words of each callback out of an opening's user data."""
    text = user_data.rstrip(b"\0").decode("ascii", "replace")
    programs = {}
    for part in text.split("|"):
        callback, found, words = part.partition(":")
        if found:
            programs[callback] = words.split()
    return programs


class Unruly(Device):
    """The device itself. ``slowness`` are the seconds that ``slow`` takes."""

    class_id = UUID("6a6d2d9c-6a4e-4a0c-8c0e-5f8f3c2a7b11")
    name = "unruly"
    channels = 4
    max_channels = 24
    max_packet_size = 8192
    max_external_data = 1 << 20
    transaction_quota = 32

    def __init__(self, image: int, slowness: float, unplug: list[str]) -> None:
        self.image = image
        self.slowness = slowness
        self.gate = Gate()
        self.mapped: dict[Any, Any] = {}
        self._unplug = unplug
        self._numbers = itertools.count(1)

    def _run(self, what: str, channel: Any, packet: Packet | None, words: list[str]) -> None:
        program = Program(self, f"{what} {next(self._numbers)}", words, channel, packet)
        try:
            program.run()
        finally:
            self.gate.ended(program)

    def _callback(self, what: str, channel: Channel) -> None:
        words = parse_programs(channel.user_data).get(what)
        if words:
            self._run(f"{channel.name} {what}", channel, None, words)

    def opened(self, channel: Channel) -> None:
        self._callback("opened", channel)

    def resumed(self, channel: Channel) -> None:
        self._callback("resumed", channel)

    def started(self, channel: Channel) -> None:
        self._callback("started", channel)

    def post_started(self, channel: Channel) -> None:
        self._callback("post_started", channel)

    def suspended(self, channel: Channel) -> None:
        self._callback("suspended", channel)

    def closed(self, channel: Channel) -> None:
        self.mapped.pop(channel, None)
        self._callback("closed", channel)

    def processing_complete(self, channel: Channel, count: int) -> None:
        self._callback("processing_complete", channel)

    def unplug_requested(self) -> None:
        self._run("unplug_requested", None, None, self._unplug)

    def packet_received(self, channel: Channel, packet: Packet) -> Any:
        self._run(f"{channel.name} packet", channel, packet, words_of(packet))

    def packet_rejected(self, channel: Channel, packet: Packet, error: PacketError) -> None:
        try:
            words = parse_programs(channel.user_data).get("packet_rejected", [])
            self._run(f"{channel.name} rejected", channel, packet, words)
        finally:
            if not packet.completed:
                packet.complete(b"rejected")


class Gathering(Unruly):
    """The same, with completions published together."""

    gather_completions = True


class Coroutines(Unruly):
    """The same, with packets handled on an event loop."""

    async def packet_received(self, channel: Channel, packet: Packet) -> None:
        what = f"{channel.name} coroutine {next(self._numbers)}"
        program = Program(self, what, words_of(packet), channel, packet)
        try:
            await program.run_async()
        finally:
            self.gate.ended(program)


def words_of(packet: Packet) -> list[str]:
    """Returns the words in a packet; of one that has none, those that complete it."""
    text = packet.payload.rstrip(b"\0")
    if not text.startswith(b"!"):
        return ["complete"]
    words = text[1:].decode("ascii", "replace").split()
    known = [word for word in words if word in WORDS]
    return known or ["complete"]


WORDS = frozenset(
    {name[3:] for name in vars(Program) if name.startswith("do_")} | {"spawn", "defer", "block"}
)
"""The words that there are."""

DEVICES = {"plain": Unruly, "gathering": Gathering, "coroutines": Coroutines}
"""The kinds of the device, by the name that a sequence has for them."""
