# SPDX-License-Identifier: GPL-2.0-or-later
"""What a sequence is carried out with, and the four sentences that are checked all the time.

* *answered*: every request is answered, or its connection ended, in less than the time that the
  specification gives (:data:`ANSWER_TIMEOUT`), by the back end's own clock;
* *still*: once the end of a channel, of a GPADL, of a region or of a connection is acknowledged,
  nothing of what came before touches guest memory, an eventfd or the image. (An access to
  a disk that hangs may end later, but while the disk says that it is not ready.)
* *contained*: nothing ends more than its channel: the others answer, the connection stands as long
  as the front end keeps the protocol, the server goes on;
* *flat*: in the end the process has the descriptors, the threads, the mappings and the memory that
  it had at first.

A page that nobody may touch any more is filled with noise, and compared later: above all after
code of the device that was held up has been let go.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.liveness import scsi
from tests.liveness.process import HARD_LIMIT, BackEndProcess, Nursery
from tests.liveness.steps import DISKS
from vhostvmbus.guest import GuestRam, RamRegion
from vhostvmbus.guest.front_end import FrontEnd
from vhostvmbus.ring import RawPacket, Ring
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import Disconnected, ProtocolError, RequestRefused
from vhostvmbus.vhost_user.messages import ProtocolFeature
from vhostvmbus.vhost_user.sockets import close_all, receive_before
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.vmbus import PAGE_SIZE

ANSWER_TIMEOUT = 10.0
"""Seconds that a front end gives the back end for an answer, before they are shortened."""
NOISE = random.Random(13).randbytes(PAGE_SIZE)
"""The content of a page that nobody may touch."""
MIB = 1 << 20
REGIONS = ((0, 4 * MIB), (0x1_0000_0000, 4 * MIB), (0x80_0000, 2 * MIB))
"""The regions of guest memory: address and size."""
MOMENT = 0.03
"""Seconds in which a host that is not held up takes what is in its ring."""
GO_LIMIT = 20.0
"""Seconds in which code of the device that was let go has to come to its end."""


class Finding(Exception):
    """A sentence that does not hold."""

    def __init__(self, sentence: str, what: str) -> None:
        super().__init__(f"not {sentence}: {what}")
        self.sentence = sentence


class Late(Finding):
    """An answer that came, but not in time: which a machine that is too busy can do as well."""


class Peer(FrontEnd):
    """The front end's end of one connection; ``back`` is what it does with back-end requests."""

    def __init__(self, sock: socket.socket, features: ProtocolFeature, back: str) -> None:
        self._back = back
        super().__init__(sock, features, self._answer, HARD_LIMIT)

    def _answer(self, message: m.Message) -> int:
        if self._back == "mute":
            # Until the socket is shut down, which is when this end leaves.
            poll = select.poll()
            poll.register(self._mine, select.POLLRDHUP)
            poll.poll()
        elif self._back == "leaves":
            self._mine.shutdown(socket.SHUT_RDWR)
        elif self._back == "refuses":
            return NtStatus.NOT_SUPPORTED
        return NtStatus.SUCCESS

    @property
    def back_fd(self) -> int:
        """The descriptor that the back end gets for its requests."""
        return self._theirs.fileno()

    def hang_up(self) -> None:
        """Says that nothing comes any more."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def wait_for_end(self) -> bool:
        """Waits until the back end has closed its end. Returns false if it never does."""
        try:
            while True:
                data, fds = receive_before(self._sock, 4096, time.monotonic() + HARD_LIMIT)
                close_all(fds)
                if not data:
                    return True
        except TimeoutError:
            return False
        except (OSError, ProtocolError):
            return True

    def drop(self) -> None:
        """Closes everything at once, as a process that is killed does."""
        for sock in (self._sock, self._mine):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self.close(wait=0)


@dataclass(eq=False)
class Opened:
    """A channel that the guest has open."""

    opening: Opening
    ring: Ring
    pfns: list[int]
    kick: int
    call: int
    sound: bool = True
    """Nothing was done to it by which its device may legitimately have stopped serving it."""
    pages: list[int] = field(default_factory=list)
    """The pages of its packets."""
    answers: dict[int, RawPacket] = field(default_factory=dict)
    from_host: list[RawPacket] = field(default_factory=list)
    next_id: int = 1
    held: int = 0
    """Packets that may be outstanding for long."""

    @property
    def index(self) -> int:
        """The channel's index."""
        return self.opening.index

    def close(self) -> None:
        """Gives up the guest's end."""
        self.ring.close()
        for fd in (self.kick, self.call):
            os.close(fd)


@dataclass
class Quiet:
    """Pages and an eventfd that nobody may touch any more; ``what`` they were."""

    what: str
    pfns: list[int]
    call: int = -1


class Rig:
    """A back end's process (``child``, or a new one), one front end, and a guest's memory."""

    def __init__(
        self,
        nursery: Nursery,
        folder: Path,
        config: dict[str, Any],
        child: BackEndProcess | None = None,
    ) -> None:
        self.config = config
        self.budget = ANSWER_TIMEOUT * config["patience"]
        self.story: list[str] = []
        self._nursery = nursery
        self._folder = folder
        self.child = child or BackEndProcess(nursery, folder, config)
        self.peer: Peer | None = None
        self.lawful = True
        """Set while the back end has no reason to end the connection: the front end has kept the
        protocol, and answered, and the device is in no access to guest memory that does not end.
        """
        self.ram = GuestRam(())
        self.slots: list[RamRegion] = [self.ram.add(*region) for region in REGIONS]
        self.shared: set[int] = set()
        self.lost: set[int] = set()
        shuffle = random.Random(1)
        self._free: list[list[int]] = []
        for start, size in REGIONS:
            pfns = list(range(max(1, start // PAGE_SIZE), (start + size) // PAGE_SIZE))
            shuffle.shuffle(pfns)
            self._free.append(pfns)
        self.channels: dict[int, Opened] = {}
        self.gpadls: dict[int, tuple[int, list[int]]] = {}
        """The channel and the pages of each GPADL, by its number."""
        self.gpadl_numbers = 0x100
        self.quiet: list[Quiet] = []
        self.still_image: bytes | None = None
        """What the image has to have, while no channel is open."""
        self.inflight: tuple[m.InflightReply, int] | None = None
        self.harmless = scsi.harmless() if self.disk else b"!complete"
        """A packet that every device completes at once."""

    def close(self) -> None:
        """Ends everything, without a check."""
        self.close_guest()
        self.child.close()

    def close_guest(self) -> None:
        """Ends everything but the back end's process."""
        if self.peer is not None:
            self.peer.drop()
            self.peer = None
        self.forget_inflight()
        for opened in self.channels.values():
            opened.close()
        for item in self.quiet:
            if item.call >= 0:
                os.close(item.call)
        self.ram.close()

    # ---- what is told and measured ----

    def note(self, text: str) -> None:
        """Adds to the story of the step that is carried out."""
        self.story.append(f"      {text}")

    def check_time(self, what: str, began: float) -> None:
        """Fails if ``what`` took longer, since ``began``, than the back end may."""
        took = self.child.seconds() - began
        if took >= self.budget:
            self.child.dump()
            raise Late("answered", f"{what} after {took:.2f} s of {self.budget:.2f} s")

    def request(self, message: m.Message, fds: Sequence[int] = ()) -> int | None:
        """Makes a request. Returns its status; ``None`` if the connection ended over it."""
        answer = self.ask(message, fds)
        return answer if isinstance(answer, int) else None if answer is None else 0

    def ask(self, message: m.Message, fds: Sequence[int] = ()) -> m.Message | int | None:
        """Makes a request. Returns the answer, the status that refused it, or ``None``."""
        name = type(message).__name__
        if self.peer is None:
            return None
        began = self.child.seconds()
        answer: m.Message | int | None
        self.answer_fds: tuple[int, ...] = ()
        try:
            answer, self.answer_fds = self.peer.request_with_fds(message, fds)
        except RequestRefused as error:
            answer = error.status
        except TimeoutError:
            self.child.dump()
            raise Finding("answered", f"no answer to {name} in {HARD_LIMIT:g} s") from None
        except (Disconnected, ProtocolError) as error:
            answer = None
            self.note(f"{name}: {error}")
        took = self.child.seconds() - began
        if isinstance(answer, int):
            self.note(f"{name} refused with {answer:#x} in {took:.2f} s")
        elif answer is not None and took >= 0.05:
            self.note(f"{name} answered in {took:.2f} s")
        self.check_time(f"{name} was answered", began)
        if answer is None:
            self.ended(f"over {name}")
        return answer

    def ended(self, why: str) -> None:
        """The back end ended the connection, which it may if the front end broke the protocol."""
        if not self.child.alive:
            code = self.child.wait(1)
            raise Finding("contained", f"the back end's process ended {why}, with code {code}")
        if self.lawful:
            raise Finding("contained", f"the back end ended the connection {why}")
        self.note("the connection ended")
        self.leave("polite")

    # ---- the end of a connection ----

    def leave(self, how: str) -> None:
        """Ends the connection, and waits for the back end's part of it if it can be seen."""
        peer, self.peer = self.peer, None
        if peer is None:
            return
        self.shared.clear()
        if how == "polite":
            began = self.child.seconds()
            peer.hang_up()
            if not peer.wait_for_end():
                self.child.dump()
                raise Finding("answered", f"the end of the connection took {HARD_LIMIT:g} s")
            self.check_time("the back end hung up", began)
            self.note(f"the back end hung up in {self.child.seconds() - began:.2f} s")
        peer.drop()

    def memory_copy(self) -> list[bytes]:
        """Returns the content of the guest's memory, as far as it is not lost."""
        views = []
        for slot, region in enumerate(self.slots):
            if slot not in self.lost:
                (span,) = self.ram.memory.translate(region.guest_phys_addr, region.size)
                views.append(bytes(span.view))
        return views

    def check_disconnected(self) -> None:
        """No connection is served: lets everything go, and looks whether anything is touched."""
        self.check_untouched("")
        for slot, region in enumerate(self.slots):
            used = self.child.uses_file(region.fd, shared=True)
            if used and slot not in self.lost:
                raise Finding("still", f"memory of the front end that left is {used}")

    def check_untouched(self, when: str) -> None:
        """Lets everything go, and looks whether memory or image is touched."""
        memory, image = self.memory_copy(), self.child.image.read_bytes()
        self.go()
        for before, after in zip(memory, self.memory_copy(), strict=True):
            if before != after:
                page = next(
                    at for at in range(0, len(before), PAGE_SIZE)
                    if before[at : at + PAGE_SIZE] != after[at : at + PAGE_SIZE]
                )  # fmt: skip
                raise Finding(
                    "still", f"guest memory was written{when}, {page:#x} bytes into a region"
                )
        if (when or not self.disk) and self.child.image.read_bytes() != image:
            raise Finding("still", f"the image was written{when}")

    # ---- what may not be touched ----

    def silence(self, what: str, pfns: Sequence[int], call: int = -1) -> None:
        """Notes that nobody may touch these pages, nor signal ``call``."""
        pfns = [pfn for pfn in pfns if self.slot_of(pfn) not in self.lost]
        for pfn in pfns:
            self.ram.page(pfn)[:] = NOISE
        kept = -1
        if call >= 0 and "eventfd" in os.readlink(f"/proc/self/fd/{call}"):
            kept = os.dup(call)
            os.set_blocking(kept, False)
            with contextlib.suppress(BlockingIOError):
                while True:  # a semaphore gives one at a time
                    os.eventfd_read(kept)
        self.quiet.append(Quiet(what, pfns, kept))

    def check_quiet(self) -> None:
        """Fails if something was touched that nobody may touch."""
        for item in self.quiet:
            for pfn in item.pfns:
                if self.slot_of(pfn) not in self.lost and self.ram.page(pfn) != NOISE:
                    raise Finding("still", f"page {pfn:#x} of {item.what} was written")
            if item.call >= 0 and select.select([item.call], [], [], 0)[0]:
                raise Finding("still", f"the guest was signalled for {item.what}")
        if self.still_image is not None and self.child.image.read_bytes() != self.still_image:
            raise Finding("still", "the image was written while no channel was open")

    def go(self) -> None:
        """Lets all code of the device go on that is held up, and looks at what it does."""
        if not self.child.alive:
            return
        left = self.child.tell("go", GO_LIMIT)
        if left:
            self.note(f"has not ended: {left}")
        self.check_quiet()

    def forget_channel(self, index: int, why: str) -> None:
        """Notes that the back end is done with a channel."""
        opened = self.channels.pop(index, None)
        if opened is not None:
            call = opened.call
            what = f"channel {index}, {why},"
            self.silence(what, [*opened.pfns, *opened.pages], call)
            opened.close()

    def forget_gpadl(self, number: int, why: str) -> None:
        """Notes that the back end is done with a GPADL, and with the channel whose ring it was."""
        _, pfns = self.gpadls.pop(number)
        for index, opened in list(self.channels.items()):
            if opened.opening.gpadl_id == number:
                self.forget_channel(index, why)
        self.silence(f"GPADL {number:#x}, {why},", pfns)

    def forget_all(self, why: str) -> None:
        """Notes that the back end is done with everything that the guest had."""
        for index in list(self.channels):
            self.forget_channel(index, why)
        for number in list(self.gpadls):
            self.forget_gpadl(number, why)
        if not self.disk:
            self.still_image = self.child.image.read_bytes()

    @property
    def disk(self) -> bool:
        """Tells whether the device is a controller with a slow disk."""
        return self.config["device"] in DISKS

    def forget_inflight(self) -> None:
        """Forgets the in-flight region."""
        if self.inflight is not None:
            os.close(self.inflight[1])
            self.inflight = None

    # ---- pages ----

    def slot_of(self, pfn: int) -> int:
        """Returns which region a page is in."""
        for slot, (start, size) in enumerate(REGIONS):
            if start <= pfn * PAGE_SIZE < start + size:
                return slot
        return -1

    def take_pages(self, count: int) -> list[int]:
        """Returns pages that nobody has had so far, of regions that are shared if there are any."""
        slots = [slot for slot in self.shared if slot not in self.lost] or [0]
        taken = []
        for number in range(count):
            free = self._free[slots[number % len(slots)]]
            if not free:  # a sequence needs a fraction of them; who comes here has made it longer
                raise RuntimeError("the guest has no page left")
            taken.append(free.pop())
        return taken

    # ---- packets ----

    def kick(self, opened: Opened) -> None:
        """Signals the host, unless that would block."""
        with contextlib.suppress(OSError):
            if select.select([], [opened.kick], [], 0)[1]:
                os.write(opened.kick, struct.pack("<Q", 1))

    def send(self, opened: Opened, payload: bytes, ranges: Sequence[GpaRange] = ()) -> int:
        """Sends a packet. Returns its transaction id, 0 if there was no room."""
        number, opened.next_id = opened.next_id, opened.next_id + 1
        if ranges:
            sent = opened.ring.send_gpa_direct(payload, ranges, transaction_id=number)
        else:
            sent = opened.ring.send(6, payload, transaction_id=number, flags=1)
        if sent.error is not None:
            opened.sound = False
            return 0
        if sent.signal:
            self.kick(opened)
        return 0 if sent.full else number

    def wait_taken(self, opened: Opened) -> None:
        """Gives the host a moment to take what was sent: most steps are about what it has."""
        deadline = time.monotonic() + MOMENT
        while opened.ring.state.tx_free < opened.ring.state.tx_size and time.monotonic() < deadline:
            time.sleep(0.001)

    def receive(self, opened: Opened) -> None:
        """Takes what the host sent."""
        for _ in range(20):
            batch = opened.ring.receive()
            for packet in batch.packets:
                if packet.type == 11:
                    opened.answers[packet.transaction_id] = packet
                else:
                    opened.from_host.append(packet)
            if batch.signal:
                self.kick(opened)
            if batch.error is not None:
                if opened.sound:
                    raise Finding("contained", f"the ring of {opened.index} broke: {batch.error}")
                return
            if not batch.packets:
                return

    def expect_echo(self, opened: Opened) -> bytes:
        """Fails if a channel that has no trouble does not complete a packet; else returns that."""
        began, number = self.child.seconds(), 0
        hard = time.monotonic() + HARD_LIMIT
        while True:
            self.receive(opened)
            if number and number in opened.answers:
                return opened.answers[number].payload
            number = number or self.send(opened, self.harmless)
            if not opened.sound:
                return b""
            if self.child.seconds() - began > self.budget or time.monotonic() > hard:
                self.child.dump()
                what = f"channel {opened.index}, which had no trouble, does not answer"
                raise Finding("contained", what)
            if not self.child.alive:
                raise Finding("contained", f"the process ended, code {self.child.wait(1)}")
            with contextlib.suppress(OSError):
                if select.select([opened.call], [], [], 0.01)[0]:
                    os.set_blocking(opened.call, False)
                    os.read(opened.call, 8)
