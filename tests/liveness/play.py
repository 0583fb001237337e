# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries the steps of a sequence out: a method for each kind of step, and the end of them all."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

from tests.liveness import descriptors, scsi
from tests.liveness.process import HARD_LIMIT, BackEndProcess, Nursery
from tests.liveness.rig import GO_LIMIT, NOISE, Finding, Opened, Peer, Rig
from tests.liveness.steps import Sequence, Step
from tests.liveness.unruly import gpadl_of, parse_programs
from tests.support.footprint import Footprint
from vhostvmbus.guest import GuestCodeMap, HostileChannel, connect_socket
from vhostvmbus.guest.software_guest import VERSION
from vhostvmbus.ring import Ring, Role
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import NEED_REPLY, encode
from vhostvmbus.vhost_user.codec import VERSION as HEADER_VERSION
from vhostvmbus.vhost_user.gpadl import write_list
from vhostvmbus.vhost_user.messages import ProtocolFeature
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.vmbus import PAGE_SIZE

GENTLE = frozenset(
    {"nap", "spawn", "note", "stats", "write", "read", "load", "store", "fill", "look", "scrawl"}
    | {"send", "ask", "complete", "unmap"}
)
"""Words of packets after which a channel goes on serving its guest."""
HARMLESS = frozenset({"nap", "note", "stats", "send", "ask"})
"""Words of callbacks that a channel starts by, after which it serves its guest."""
HELD_LIMIT = 20
"""Packets that may be outstanding; the device's quota is not reached by then."""
POOL = 8
"""The threads of a disk's controller."""
OPENINGS = 100
"""How often it is tried in the end to open a channel: a transfer from before may go on."""
MEMORY_LIMIT = 48 << 10
"""KiB by which the process may have grown: the allocators keep what they had once."""


class Player(Rig):
    """Carries steps out, one after the other."""

    def play(self, sequence: Sequence) -> None:
        """Carries the whole sequence out. Raises :class:`Finding`."""
        self.warm_up()
        before = self.child.footprint()
        for number, step in enumerate(sequence.steps):
            self._take(number, step)
            before = self._restarted or before
            self._restarted = None
        self.story.append("the end")
        self._finish(before)

    def play_session(self, steps: Items[Step]) -> None:
        """Carries one session out, and a good one after it. Raises :class:`Finding`."""
        for number, step in enumerate(steps):
            self._take(number, step)
        self.do_connect("good", "", False, False, False)
        self.leave("polite")
        self.check_disconnected()
        self.check_quiet()

    def _take(self, number: int, step: Step) -> None:
        self.story.append(f"{number:4}  {step}")
        getattr(self, f"do_{step.name}")(**step.args)
        if not self.child.alive:
            code = self.child.wait(1)
            raise Finding("contained", f"the back end's process ended, with code {code}")

    @property
    def pool(self) -> int:
        """The threads that the device makes when it first has work for them, and keeps."""
        return POOL if self.disk else 0

    _restarted: Footprint | None = None
    """What the process had that took the place of one that was killed."""

    def warm_up(self) -> None:
        """One whole session, so that what is made once is there, and is counted as such."""
        self.do_connect("good", "", True, False, False)
        self.do_open(0, [3, 3], "")
        if self.disk:
            self.do_command(0, "write", 0, 1)
        else:
            self.do_packet(0, "write complete", 1, 1)
        self.do_probe()
        self.leave("polite")
        self.forget_all("of the first session")
        self.forget_inflight()
        self.child.tell("collect")
        self.story.clear()

    def _finish(self, before: Footprint) -> None:
        """Everything ends: what is left must be what there was, and the server must serve."""
        self.go()
        if self.peer is not None:
            self.leave("polite")
            self.check_disconnected()
            self.forget_all("of the last connection")
        # What a device has lent waits one after the other to be given back.
        self.child.tell("remove the gate")
        for _ in range(OPENINGS):
            self.do_connect("good", "", False, False, False)
            if self.peer is None:
                raise Finding("contained", "the server does not serve any more")
            self.do_open(0, [3, 3], "")
            if 0 in self.channels:
                break
            time.sleep(0.02)
        else:
            raise Finding("contained", "no channel can be opened any more")
        self.do_probe()
        self.leave("polite")
        self.forget_all("of the session after it")
        self.go()
        deadline, looks = time.monotonic() + self.config.get("settle", GO_LIMIT), 0
        while True:
            self.child.tell("go", GO_LIMIT)  # what is behind something that was held up
            self.child.tell("collect")
            found = self.child.footprint().differences(before, MEMORY_LIMIT, self.pool)
            if not found:
                break
            if time.monotonic() > deadline:
                self.child.dump()
                raise Finding("flat", ", ".join(found))
            time.sleep(0.02)
            looks += 1
            if not looks % 20:
                # Memory in which an access ended late is given up with the next that comes.
                self.do_connect("good", "", False, False, False)
                self.leave("polite")
        self.check_quiet()
        deaths = self.child.tell("deaths")
        if deaths is None:
            raise Finding("contained", f"the process ended, code {self.child.wait(1)}")
        if deaths:
            raise Finding("contained", f"a thread died: {deaths}")
        began = self.child.seconds()
        self.child.stop()
        code = self.child.wait(HARD_LIMIT)
        if code is None:
            self.child.dump()
            raise Finding("answered", "the server did not end when it was asked to")
        self.check_time("the server ended", began)
        if code or self.child.path.exists():
            raise Finding("contained", f"the server ended with {code}, its socket file is left")

    # ---- the connection ----

    def do_connect(
        self, back: str, code_map: str, inflight: bool, table: bool, resume: bool
    ) -> None:
        if self.peer is not None:
            self.leave("polite")
        try:
            sock = connect_socket(self.child.path)
        except OSError as error:
            raise Finding("contained", f"nobody can connect: {error}") from error
        features = m.REQUIRED_FEATURES
        features |= ProtocolFeature.VMBUS_UNPLUG | ProtocolFeature.VMBUS_SUSPEND
        features |= ProtocolFeature.VMBUS_CODE_MAP if code_map else ProtocolFeature(0)
        features |= ProtocolFeature.INFLIGHT_SHMFD if inflight else ProtocolFeature(0)
        good = back in ("good", "mute", "refuses", "leaves")
        self.peer = Peer(sock, features, back if good else "good")
        self.lawful = back == "good"
        fd = self.peer.back_fd if good else descriptors.make(back)
        try:
            for message in (
                m.GetFeatures(),
                m.GetProtocolFeatures(),
                m.SetProtocolFeatures(int(features)),
                m.SetFeatures(m.F_PROTOCOL_FEATURES),
                m.SetOwner(),
                m.SetBackendReqFd(),
                m.GetMaxMemSlots(),
                m.GetOffer(),
            ):
                backs = [fd] if isinstance(message, m.SetBackendReqFd) else []
                if self.request(message, backs) is None:
                    return
        finally:
            if not good:
                os.close(fd)
        # The end of the connection before this one has been noticed by now.
        if not (resume and self.channels):
            self.forget_all("of the connection before")
        self._share(table)
        if code_map:
            self.do_code_map(code_map)
        if inflight:
            self._share_inflight()
        else:
            self.forget_inflight()
        if self.peer is not None and self.channels:
            self._resume()

    def _share(self, table: bool) -> None:
        if table:
            regions = [self.slots[slot] for slot in range(len(self.slots))]
            message = m.SetMemTable(tuple(region.message() for region in regions))
            if self.request(message, [region.fd for region in regions]) == 0:
                self.shared = set(range(len(self.slots)))
            return
        for slot in range(len(self.slots)):
            self.do_memory("add", slot)

    def _share_inflight(self) -> None:
        if self.inflight is not None:
            reply, fd = self.inflight
            message = m.SetInflightFd(
                reply.mmap_size, reply.mmap_offset, reply.num_queues, reply.queue_size
            )
            status = self.request(message, [fd])
            if status == 0 or status is None:
                return
            self.forget_inflight()
        self.do_inflight("get")

    def _resume(self) -> None:
        for number, (channel, pfns) in list(self.gpadls.items()):
            if self._create(channel, number, pfns) != 0:
                if self.peer is None:
                    return
                self.forget_gpadl(number, "refused after a reconnection")
        for index, opened in list(self.channels.items()):
            opening = opened.opening
            again = Opening(
                index, opening.gpadl_id, opening.ring_offset, 0, VERSION, opening.user_data, True
            )
            self._stain_by_programs(opened)
            opened.held = 0 if self.inflight is None else opened.held
            status = self.request(m.Open(again), [opened.kick, opened.call])
            if status is None:
                return
            if status:
                self.forget_channel(index, "refused after a reconnection")
            else:
                self.kick(opened)

    def do_disconnect(self, how: str) -> None:
        peer = self.peer
        if peer is None:
            return
        if how == "amid":
            for message in (m.Reset(), m.Close(0)):
                with contextlib.suppress(OSError):
                    peer.send_raw(encode(message, flags=NEED_REPLY))
        elif how == "half":
            with contextlib.suppress(OSError):
                peer.send_raw(encode(m.Open(Opening(0, 1, 1)), flags=NEED_REPLY)[:20])
        if how == "polite":
            self.leave("polite")
            self.check_disconnected()
        else:
            self.leave("abrupt")
        if how == "amid":  # whether they were carried out, nobody knows
            self.stale = True
            for opened in self.channels.values():
                opened.sound = False

    stale = False

    def do_kill(self) -> None:
        """Ends the back end's process, and starts another one."""
        if self.peer is not None:
            peer, self.peer = self.peer, None
            self.child.kill()
            peer.drop()
        self.child.close()
        self.shared.clear()
        self.child = BackEndProcess(self._nursery, self._folder, self.config)
        kept = self.channels, self.gpadls, self.inflight, self.still_image
        self.channels, self.gpadls, self.inflight, self.still_image = {}, {}, None, None
        story = self.story[:]
        self.warm_up()
        self.story[:] = story
        self.channels, self.gpadls, self.inflight, self.still_image = kept
        self._restarted = self.child.footprint()

    def do_broken(self, kind: str, odd: list[str]) -> None:
        peer = self.peer
        if peer is None:
            return
        self.lawful = False
        header = {
            "version": (1028, 0 | NEED_REPLY, 8),
            "unknown": (4711, HEADER_VERSION | NEED_REPLY, 8),
            "oversize": (1028, HEADER_VERSION | NEED_REPLY, 1 << 20),
            "size": (1028, HEADER_VERSION | NEED_REPLY, 4),
            "flags": (1028, HEADER_VERSION | 0x100, 8),
            "fds": (1028, HEADER_VERSION | NEED_REPLY, 8),
            "order": (1, HEADER_VERSION, 0),
            "no-reply": (1030, HEADER_VERSION, 0),
        }[kind]
        data = struct.pack("<III", *header) + bytes(min(header[2], 64))
        fds = [descriptors.make(item) for item in (odd or (["memfd"] if kind == "fds" else []))]
        began = self.child.seconds()
        try:
            with contextlib.suppress(OSError):
                peer.send_raw(data, fds)
        finally:
            for fd in fds:
                os.close(fd)
        if not peer.wait_for_end():
            self.child.dump()
            raise Finding("answered", f"the connection did not end in {HARD_LIMIT:g} s")
        self.check_time("the connection ended", began)
        self.leave("polite")
        self.check_disconnected()

    # ---- memory ----

    def do_memory(self, do: str, slot: int, slots: Items[int] = (), odd: str | None = None) -> None:
        if self.peer is None:
            return
        if odd is not None:
            self.lawful = False
            fd = descriptors.make(odd)
            try:
                self.request(m.AddMemReg(m.MemoryRegion(1 << 30, 1 << 20, 1 << 45, 0)), [fd])
            finally:
                os.close(fd)
            return
        region = self.slots[slot]
        match do:
            case "add":
                if self.request(m.AddMemReg(region.message()), [region.fd]) == 0:
                    self.shared.add(slot)
            case "remove":
                if self.request(m.RemMemReg(region.message())) == 0:
                    self._gone({slot})
            case "table":
                message = m.SetMemTable(tuple(self.slots[item].message() for item in slots))
                before = set(self.shared)
                if self.request(message, [self.slots[item].fd for item in slots]) == 0:
                    self.shared = set(slots)
                    self._gone(before - set(slots))

    def _gone(self, slots: set[int]) -> None:
        """The back end has no region of these any more, and no channel that was in them."""
        self.shared -= slots
        for slot in slots:
            if slot in self.lost:
                continue
            used = self.child.uses_file(self.slots[slot].fd, shared=True)
            if used:
                raise Finding("still", f"a region that was removed is {used}")
        for index, opened in list(self.channels.items()):
            if {self.slot_of(pfn) for pfn in opened.pfns} & slots:
                self.forget_channel(index, "whose ring's memory was removed")
            elif {self.slot_of(pfn) for pfn in opened.pages} & slots:
                opened.sound = False

    def do_truncate(self, slot: int) -> None:
        if self.peer is None:
            return
        self.lost.add(slot)
        os.ftruncate(self.slots[slot].fd, 0)
        for opened in self.channels.values():
            if slot in {self.slot_of(pfn) for pfn in [*opened.pfns, *opened.pages]}:
                opened.sound = False

    def do_code_map(self, bits: str, odd: str | None = None) -> None:
        if self.peer is None or ProtocolFeature.VMBUS_CODE_MAP not in self.peer.features:
            return
        regions = [self.slots[slot] for slot in sorted(self.shared)]
        code_map = GuestCodeMap(regions, cannot_tell=bits == "all")
        fd = code_map.fd
        if odd is not None:
            self.lawful = False
            fd = descriptors.make(odd)
        try:
            self.request(code_map.message(), [fd])
        finally:
            if odd is not None:
                os.close(fd)
            code_map.close()

    def do_inflight(self, kind: str, odd: str | None = None) -> None:
        if self.peer is None or ProtocolFeature.INFLIGHT_SHMFD not in self.peer.features:
            return
        if kind == "garbage":
            if self.inflight is not None:
                reply, fd = self.inflight
                with contextlib.suppress(OSError):
                    os.pwrite(fd, NOISE * (reply.mmap_size // PAGE_SIZE), reply.mmap_offset)
                for opened in self.channels.values():
                    opened.sound = False
            return
        if kind == "set" and odd is not None:
            self.lawful = False
            fd = descriptors.make(odd)
            try:
                self.request(m.SetInflightFd(1 << 18, 0, 24, 32), [fd])
            finally:
                os.close(fd)
            return
        answer = self.ask(m.GetInflightFd(0, 0, 24, 0))
        if isinstance(answer, m.InflightReply) and self.answer_fds:
            self.forget_inflight()
            self.inflight = answer, self.answer_fds[0]

    # ---- GPADLs ----

    def _create(self, channel: int, number: int, pfns: Items[int], **how: Any) -> int | None:
        fd, size = write_list([GpaRange.of_pages(list(pfns))])
        try:
            count = 1
            self.lawful &= how.get("lie") not in ("more", "fewer")
            if how.get("lie") == "more":
                count, size = 2, size + 16
            elif how.get("lie") == "fewer":
                size -= 8
            odd = how.get("odd")
            if odd is not None:
                self.lawful = False
                os.close(fd)
                fd = descriptors.make(odd)
            return self.request(m.GpadlCreate(channel, number, count, size), [fd])
        finally:
            os.close(fd)

    def do_gpadl(
        self, channel: int, pages: int, odd: str | None = None, lie: str | None = None
    ) -> None:
        """Makes the GPADL that the device maps when a packet says so."""
        if self.peer is None:
            return
        number = gpadl_of(channel)
        pfns = self.take_pages(pages)
        named = [1 << 40] if lie == "outside" else pfns
        if self._create(channel, number, named, odd=odd, lie=lie) == 0:
            if odd is None and lie is None:
                self.gpadls[number] = channel, pfns
            else:  # accepted, and is no GPADL of ours
                self.request(m.GpadlTeardown(channel, number))

    def do_teardown(self, channel: int, what: str) -> None:
        number = gpadl_of(channel)
        if what == "ring" and channel in self.channels:
            number = self.channels[channel].opening.gpadl_id
        elif what == "unknown":
            number = 0xBAD
        if self.request(m.GpadlTeardown(channel, number)) == 0 and number in self.gpadls:
            self.forget_gpadl(number, "torn down")

    # ---- channels ----

    def do_open(
        self, channel: int, ring: Items[int], programs: str = "", odd: Items[str] = ()
    ) -> None:
        if self.peer is None:
            return
        if channel in self.channels:  # once more, which is refused
            opened = self.channels[channel]
            self.request(m.Open(opened.opening), [opened.kick, opened.call])
            return
        pfns = self.take_pages(sum(ring))
        for pfn in pfns:
            self.ram.page(pfn)[:] = bytes(PAGE_SIZE)
        number, self.gpadl_numbers = self.gpadl_numbers, self.gpadl_numbers + 1
        if self._create(channel, number, pfns) != 0:
            return
        self.gpadls[number] = channel, pfns
        kinds = list(odd) or ["eventfd", "eventfd"]
        kick, call = (descriptors.make(kind) for kind in kinds)
        self.lawful &= all(kind.startswith("eventfd") for kind in kinds)
        guest = Ring(self.ram.memory, pfns, ring[0], Role.GUEST, initialize=True)
        opening = Opening(channel, number, ring[0], 0, VERSION, programs.encode()[:120])
        opened = Opened(opening, guest, pfns, kick, call)
        opened.sound = kinds == ["eventfd", "eventfd"]
        self._stain_by_programs(opened)
        self.check_quiet()
        self.still_image = None
        status = self.request(m.Open(opening), [kick, call])
        if status == 0:
            self.channels[channel] = opened
            self.kick(opened)
            if self.disk and channel == 0:
                self._greet(opened)
            return
        if status is not None:
            self.silence(f"channel {channel}, refused,", pfns, call)
            self.gpadls.pop(number)
            self.request(m.GpadlTeardown(channel, number))
        opened.close()

    def _stain_by_programs(self, opened: Opened) -> None:
        programs = parse_programs(opened.opening.user_data)
        for callback in ("opened", "resumed", "started", "processing_complete"):
            opened.sound &= set(programs.get(callback, ())) <= HARMLESS
        opened.sound &= not set(programs.get("post_started", ())) & {"flood", "fail"}

    def do_close(self, channel: int) -> None:
        if self.request(m.Close(channel)) == 0:
            self.forget_channel(channel, "closed")
            if not self.channels and not self.disk:
                self.still_image = self.child.image.read_bytes()

    def do_modify(self, channel: int, vp: int) -> None:
        self.request(m.Modify(channel, vp))

    def do_reset(self) -> None:
        if self.request(m.Reset()) == 0:
            self.forget_all("of before the reset")

    def do_unplug(self) -> None:
        self.request(m.Unplug())

    def do_stop(self) -> None:
        """Stops the machine, and looks whether it stands still; then it goes on."""
        if self.request(m.Suspend()) == 0:
            self.check_untouched(" while the machine was stopped")
        self.request(m.Continue())

    def do_crowd(self, count: int, words: str, programs: str, end: str) -> None:
        for index in range(count):
            if index not in self.channels and self.peer is not None:
                self.do_open(index, [2, 2], programs)
        for index in list(self.channels):
            self.do_packet(index, words, 1, 1)
        if end == "reset":
            self.do_reset()
        elif end == "disconnect":
            self.do_disconnect("polite")

    # ---- the guest ----

    def do_packet(
        self, channel: int, words: str, count: int, pages: int, wrong: str | None = None
    ) -> None:
        opened = self.channels.get(channel)
        if opened is None:
            return
        for _ in range(count):
            ranges = []
            if pages:
                pfns = self.take_pages(pages)
                opened.pages += pfns
                ranges = [GpaRange.of_pages(pfns)]
            if wrong == "outside":
                ranges = [GpaRange.of_pages([1 << 40])]
            elif wrong == "long":
                words += " nap" * 2500
            if not self.send(opened, b"!" + words.encode(), ranges):
                break
            opened.held += 1
        self._stain_by_words(opened, words.split()[:20], wrong)
        self.wait_taken(opened)
        self.receive(opened)

    def _greet(self, opened: Opened) -> None:
        """Does the handshake of a storage driver; looks at the image if the disk is ready."""
        for payload in scsi.greetings():
            self.send(opened, payload)
        if not self.lawful:  # the connection may end at any moment
            return
        # The first command is told of a reset, or some such.
        answers = [self.expect_echo(opened) for _ in range(2)]
        if set(self.channels) != {0} or not scsi.good(answers[-1]):
            return
        # The guest begins to use the disk: nobody else may do anything with it any more.
        image = self.child.image.read_bytes()
        self.go()
        if self.child.image.read_bytes() != image:
            raise Finding("still", "the image was written while its disk was ready for another")

    def do_command(self, channel: int, kind: str, lba: int, blocks: int, count: int = 1) -> None:
        """Sends SCSI commands."""
        opened = self.channels.get(channel)
        if opened is None:
            return
        for _ in range(count):
            payload, data = scsi.command(kind, lba, blocks)
            ranges = []
            if data:
                pfns = self.take_pages(-(-len(data) // PAGE_SIZE))
                self.ram.write(pfns, data)
                opened.pages += pfns
                ranges = [GpaRange(len(data), 0, pfns)]
            if not self.send(opened, payload, ranges):
                break
        # Whatever the disk does, it does not hold up those that need no disk, unless the
        # channel's own thread is at it.
        opened.sound = False
        self.wait_taken(opened)
        self.receive(opened)

    def _stain_by_words(self, opened: Opened, words: list[str], wrong: str | None) -> None:
        if "spawn" in words:
            told = set(words[: words.index("spawn")])
            beside = set(words[words.index("spawn") :])
            gentle = told <= GENTLE and not beside & {"fail", "twice", "large", "quota", "pause"}
        else:
            gentle = set(words) <= GENTLE
        if wrong is not None:
            gentle = gentle and "packet_rejected" not in parse_programs(opened.opening.user_data)
        if "lendblock" in words:
            self.lawful = False
        if not gentle or opened.held >= HELD_LIMIT or self.lost or not self.lawful:
            opened.sound = False

    def do_drain(self, channel: int) -> None:
        opened = self.channels.get(channel)
        if opened is not None:
            self.receive(opened)

    def do_answer(self, channel: int) -> None:
        """Answers what the host asked."""
        opened = self.channels.get(channel)
        if opened is None:
            return
        self.receive(opened)
        asked, opened.from_host = opened.from_host, []
        for packet in asked:
            if packet.completion_requested:
                sent = opened.ring.send(11, b"fine, thanks", transaction_id=packet.transaction_id)
                if sent.signal:
                    self.kick(opened)

    def do_scribble(self, channel: int, where: str, noise: int) -> None:
        opened = self.channels.get(channel)
        if opened is None:
            return
        opened.sound = False
        raw = HostileChannel(opened.ring, opened.kick)
        chance = random.Random(noise)
        match where:
            case "out":
                raw.out_ring.header[:64] = chance.randbytes(64)
            case "in":
                raw.in_ring.header[:64] = chance.randbytes(64)
            case "data":
                raw.out_ring.put(chance.randbytes(8 * chance.randint(1, 40)))
            case "write_index":
                raw.out_ring.write_index = noise
            case "read_index":
                raw.in_ring.read_index = noise
        self.kick(opened)

    def do_jam(self, channel: int, how: str) -> None:
        """Makes an eventfd block whoever uses it: its flags are those of both ends."""
        opened = self.channels.get(channel)
        if opened is None:
            return
        opened.sound = False
        with contextlib.suppress(OSError):
            if how == "kick":
                os.set_blocking(opened.kick, True)
            else:
                os.set_blocking(opened.call, False)
                os.write(opened.call, struct.pack("<Q", descriptors.EVENTFD_FULL))
                os.set_blocking(opened.call, True)

    # ---- looking ----

    def do_go(self) -> None:
        self.go()

    def do_probe(self) -> None:
        """Channels without trouble answer."""
        if self.peer is None or not self.lawful:
            return
        for opened in list(self.channels.values()):
            if opened.sound and not self.lost:
                self.expect_echo(opened)

    def do_statistics(self) -> None:
        began = self.child.seconds()
        self.child.tell("statistics")
        self.check_time("statistics were told", began)


def play(nursery: Nursery, folder: Path, sequence: Sequence) -> tuple[Finding | None, list[str]]:
    """Carries ``sequence`` out. Returns what was found, and what was done, line by line."""
    player = Player(nursery, folder, sequence.config)
    found: Finding | None = None
    try:
        player.play(sequence)
    except Finding as finding:
        found = finding
    finally:
        player.close()
    return found, player.story
