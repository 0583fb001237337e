# SPDX-License-Identifier: GPL-2.0-or-later
"""Disk reads through the whole back end, beside plain ``preadv`` on the same file in the same run.

A back end process (``vhostvmbus serve scsi``) on one side, a guest in software on the other, over
a real socket, rings, shared pages and eventfds; no VM.  4 KiB random and 128 KiB sequential
READ(10) at queue depths 1, 4, 32, each with every request carried out in Python (``--no-plan``)
and with the plan for the ring engine that the SCSI controller makes. The guest side here is a lean
loop on the ring, with packets made beforehand, because it shares the machine with what is measured.

Besides requests a second, the processor time per request of either process says what limits a
figure: on two processors, the larger of the two at depth, their sum and the wake-ups at depth 1.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import Table
from vhostvmbus.guest import GuestChannel, SoftwareGuest
from vhostvmbus.guest.storvsc import Storvsc
from vhostvmbus.ring import wait
from vhostvmbus.wire.gpa import GpaRange, build_ranges
from vhostvmbus.wire.vmbus import COMPLETION_REQUESTED, PAGE_SIZE, PacketType

IMAGE_SIZE = 256 << 20
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Figure:
    """One line of the table."""

    name: str
    size: int
    """The bytes of a read."""
    depth: int
    plan: bool
    """Set if the ring engine does the reads; else Python does."""
    per_second: float
    """Requests a second through the back end."""
    plain: float
    """``preadv`` calls a second, one thread, same file, same sizes and offsets."""
    device_cpu: float
    """Processor time of the back end per request, in microseconds."""
    guest_cpu: float

    @property
    def ratio(self) -> float:
        """Our figure as a part of plain ``preadv``."""
        return self.per_second / self.plain


def offsets(size: int, sequential: bool) -> Iterator[int]:
    """Yields byte offsets without end, the same for every measurement."""
    blocks = IMAGE_SIZE // size
    if sequential:
        while True:
            yield from range(0, blocks * size, size)
    chance = random.Random(1)
    while True:
        yield chance.randrange(blocks) * size


def plain_reads(path: Path, size: int, sequential: bool, seconds: float) -> float:
    """Returns how many ``preadv`` calls there are in a second."""
    with mmap.mmap(-1, size) as buffer, path.open("rb", buffering=0) as file:
        buffers, fd = [buffer], file.fileno()
        count, end = 0, time.perf_counter() + seconds
        start = time.perf_counter()
        for offset in offsets(size, sequential):
            os.preadv(fd, buffers, offset)
            count += 1
            if not count % 64 and time.perf_counter() >= end:
                break
        return count / (time.perf_counter() - start)


class Slot:
    """A place in the queue: its pages, and its packet but for the address."""

    def __init__(self, driver: Storvsc, size: int) -> None:
        pfns = driver.guest.ram.alloc_pages(size // PAGE_SIZE)
        self.header = struct.pack("<II", 0, 1) + build_ranges([GpaRange(size, 0, pfns)])
        packet = driver.packet(bytes(10), size=size, direction=1)
        self.before, self.after = packet[:28], packet[38:]
        self.blocks = size // 512

    def payload(self, offset: int) -> bytes:
        """Returns READ(10) at a byte offset."""
        cdb = struct.pack(">BBIxHx", 0x28, 0, offset // 512, self.blocks)
        return self.before + cdb + self.after


def channel_reads(
    driver: Storvsc, channel: GuestChannel, size: int, depth: int, sequential: bool, seconds: float
) -> int:
    """Keeps ``depth`` reads under way for so long. Returns how many were completed."""
    ring, call = channel.ring, [channel.call_fd]
    slots = [Slot(driver, size) for _ in range(depth)]
    source = offsets(size, sequential)
    kind, flags = PacketType.DATA_USING_GPA_DIRECT, COMPLETION_REQUESTED
    idle = list(range(depth))
    done, in_flight = 0, 0
    end = time.perf_counter() + seconds
    running = True
    while running or in_flight:
        need_signal = False
        for index in idle:
            slot = slots[index]
            sent = ring.send(
                kind,
                slot.payload(next(source)),
                transaction_id=index + 1,
                flags=flags,
                header=slot.header,
                publish=False,
            )
            need_signal |= sent.signal
            if not sent.entered:
                sent.check()
        in_flight += len(idle)
        if ring.publish() or need_signal:
            channel.kick()
        idle = []
        while not (batch := ring.receive()).packets:
            if batch.error is not None:
                raise batch.error
            # As hv_storvsc does: signals are wanted only while nobody looks at the ring.
            if not ring.unmask():
                wait(call, 5.0)
            ring.mask()
        if batch.signal:
            channel.kick()
        for packet in batch.packets:
            if packet.payload[14] != 1:
                raise RuntimeError(f"a read failed: {packet.payload.hex(' ')}")
            if running:
                idle.append(packet.transaction_id - 1)
        done += len(batch.packets)
        in_flight -= len(batch.packets)
        if running and time.perf_counter() >= end:
            running, idle = False, []
    return done


def processor_time(pid: int) -> float:
    """Returns the seconds that a process has used, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


@contextmanager
def back_end(image: Path, folder: Path, plan: bool = True) -> Iterator[tuple[int, Path]]:
    """Starts a back end process for one disk. Gives its pid and socket."""
    path = folder / "scsi.sock"
    ready, theirs = os.pipe()
    # Read-only: two of them may have the image.
    command = [sys.executable, "-m", "vhostvmbus", "serve", "scsi", f"{image},ro"]
    command += [] if plan else ["--no-plan"]
    command += ["--socket", str(path), "--ready-fd", str(theirs)]
    process = subprocess.Popen(command, pass_fds=[theirs])
    os.close(theirs)
    try:
        with open(ready, "rb") as pipe:
            if not pipe.read(1):
                raise RuntimeError("the back end did not start")
        yield process.pid, path
    finally:
        process.terminate()
        process.wait()


def make_image(path: Path) -> None:
    """Writes random bytes, all of them in the page cache afterwards."""
    chance = random.Random(3)
    with path.open("wb") as file:
        for _ in range(IMAGE_SIZE >> 20):
            file.write(chance.randbytes(1 << 20))


@contextmanager
def driven(image: Path, folder: Path, plan: bool) -> Iterator[tuple[int, Storvsc]]:
    """Starts a back end process with a driver at work on it. Gives its pid and the driver."""
    folder.mkdir()
    with (
        back_end(image, folder, plan) as (pid, path),
        SoftwareGuest.connect(path) as guest,
        guest.open_channel(ring_pages=(33, 33)) as channel,
    ):
        driver = Storvsc(guest, channel)
        driver.initialize()
        yield pid, driver


def measure(folder: Path, seconds: float) -> Iterator[Figure]:
    """Yields all figures, each as soon as it is known."""
    image = folder / "disk.raw"
    make_image(image)
    with (
        driven(image, folder / "python", False) as python,
        driven(image, folder / "plan", True) as planned,
    ):
        for name, size, sequential in (
            ("4 KiB random read", 4096, False),
            ("128 KiB sequential read", 131072, True),
        ):
            plain = plain_reads(image, size, sequential, seconds)
            for depth in (1, 4, 32):
                for plan, (pid, driver) in enumerate((python, planned)):
                    device, mine = processor_time(pid), processor_time(os.getpid())
                    start = time.perf_counter()
                    count = channel_reads(driver, driver.channel, size, depth, sequential, seconds)
                    taken = time.perf_counter() - start
                    device = processor_time(pid) - device
                    mine = processor_time(os.getpid()) - mine
                    yield Figure(
                        name,
                        size,
                        depth,
                        bool(plan),
                        count / taken,
                        plain,
                        device / count * 1e6,
                        mine / count * 1e6,
                    )


def tables(seconds: float) -> list[Table]:
    """Returns the table of this benchmark."""
    table = Table(
        "Disk: reads through the back end, software guest <-> back end in another process",
        (
            "read",
            "depth",
            "by",
            "reads/s",
            "MB/s",
            "preadv/s",
            "ratio",
            "device CPU us",
            "guest CPU us",
        ),
        notes=[
            "by: who carries the reads out, the ring engine by the controller's plan or Python",
            "preadv: the same file, sizes and offsets from one Python thread, in the same run",
            "limit: the processor time per read of the slower of the two processes; at depth 1 "
            "their sum and two wake-ups",
        ],
    )
    with tempfile.TemporaryDirectory(prefix="vhostvmbus-") as folder:
        for one in measure(Path(folder), seconds):
            table.add(
                one.name,
                one.depth,
                "plan" if one.plan else "Python",
                one.per_second,
                one.per_second * one.size / 1e6,
                one.plain,
                one.ratio,
                one.device_cpu,
                one.guest_cpu,
            )
    return [table]
