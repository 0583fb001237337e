# SPDX-License-Identifier: GPL-2.0-or-later
"""Packets through a channel: the software guest here, an echo device in another process.

The whole way counts: ring, eventfd, the device's Python callback, ring, eventfd. The reference is
a bare eventfd round trip between two processes of the same run, which is what one packet at
a time cannot be faster than; for packets whose bytes are read, a plain copy of them as well.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from uuid import UUID

from benchmarks.reference import copies, eventfd_round_trips
from benchmarks.table import Table
from vhostvmbus.channel import Channel, Packet
from vhostvmbus.device import Device, DeviceHost
from vhostvmbus.guest import GuestChannel, SoftwareGuest, Transaction
from vhostvmbus.vhost_user.server import Server

DEPTHS = (1, 4, 32)
PFNS = 64


class Echo(Device):
    """Sends the in-band bytes back; external data is mapped and checked, not touched."""

    class_id = UUID("d2a4b0f4-3f5c-4e0e-8a57-6b1c4bb4b0a2")
    gather_completions = True

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Completes at once."""
        packet.complete(packet.payload)


class Reader(Echo):
    """Copies the external data out of the guest's pages."""

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Reads the pages, then completes."""
        if packet.external_data is not None:
            packet.external_data.read()
        packet.complete()


def _serve(device: type[Device], path: str, ready: Event, stop: Event) -> None:
    host = DeviceHost(device())
    server = Server(host, path)

    def stop_then() -> None:
        stop.wait()
        server.stop()

    threading.Thread(target=stop_then, daemon=True).start()
    try:
        server.run(ready.set)
    finally:
        host.close()


@contextlib.contextmanager
def in_another_process(device: type[Device]) -> Iterator[tuple[Path, int]]:
    """Serves ``device`` in a process of its own. Gives the socket's path and the process's id."""
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    with tempfile.TemporaryDirectory(prefix="vhostvmbus-bench-") as folder:
        path = Path(folder, "device.sock")
        process = context.Process(target=_serve, args=(device, str(path), ready, stop))
        process.start()
        try:
            if not ready.wait(30):
                raise RuntimeError("the device's process did not start")
            assert process.pid is not None
            yield path, process.pid
        finally:
            stop.set()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def processor_time(pid: int) -> float:
    """Returns the processor seconds that a process has used, in user space and in the kernel."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def throughput(submit: Callable[[], Transaction], depth: int, seconds: float) -> tuple[int, float]:
    """Returns packets, and packets a second, with ``depth`` of them in flight."""
    flight: deque[Transaction] = deque(submit() for _ in range(depth))
    done = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _ in range(16):
            flight.popleft().wait()
            flight.append(submit())
        done += 16
    for transaction in flight:
        transaction.wait()
    return done + depth, done / elapsed


def tables(seconds: float) -> list[Table]:
    """Returns the table of this benchmark."""
    round_trips = eventfd_round_trips(seconds)
    bulk = PFNS * 4096
    memcpy = copies(bulk, seconds)
    table = Table(
        "Ring: software guest <-> device in another process",
        (
            "packet",
            "depth",
            "packets/s",
            "MB/s",
            "us/packet",
            "x eventfd",
            "x memcpy",
            "device CPU us",
            "guest CPU us",
            "kicks/packet",
            "calls/packet",
        ),
    )

    def row(
        name: str,
        size: int,
        channel: GuestChannel,
        pid: int,
        submit: Callable[[], Transaction],
        copied: bool = False,
    ) -> None:
        for depth in DEPTHS:
            throughput(submit, depth, seconds / 10)  # warm up
            kicks, calls = channel.kicks, channel.calls
            device, guest = processor_time(pid), time.process_time()
            packets, figure = throughput(submit, depth, seconds)
            device, guest = processor_time(pid) - device, time.process_time() - guest
            table.add(
                name,
                depth,
                figure,
                figure * size / 1e6,
                1e6 / figure,
                figure / round_trips,
                figure / memcpy if copied else "",
                device / packets * 1e6,
                guest / packets * 1e6,
                (channel.kicks - kicks) / packets,
                (channel.calls - calls) / packets,
            )

    with (
        in_another_process(Echo) as (path, pid),
        SoftwareGuest.connect(path) as guest,
        guest.open_channel(ring_pages=(65, 65)) as channel,
    ):
        for size in (64, 4096):
            submit = functools.partial(channel.submit, bytes(size))
            row(f"in-band {size} B, echoed", size, channel, pid, submit)
        pfns = guest.ram.alloc_pages(PFNS)
        submit = functools.partial(channel.submit_with_external_pfns, b"command.", pfns)
        row(f"{PFNS} PFNs, not touched", bulk, channel, pid, submit)
    with (
        in_another_process(Reader) as (path, pid),
        SoftwareGuest.connect(path) as guest,
        guest.open_channel(ring_pages=(65, 65)) as channel,
    ):
        pfns = guest.ram.alloc_pages(PFNS)
        submit = functools.partial(channel.submit_with_external_pfns, b"command.", pfns)
        row(f"{PFNS} PFNs, read", bulk, channel, pid, submit, copied=True)
    table.notes = [
        f"x eventfd: packets per bare eventfd round trip ({round_trips:,.0f}/s, "
        f"{1e6 / round_trips:.1f} us)",
        f"x memcpy: packets per plain copy of {bulk // 1024} KiB ({memcpy:,.0f}/s, "
        f"{memcpy * bulk / 1e9:.1f} GB/s)",
        "CPU: processor time for each packet, user space and kernel",
        "kicks and calls: signals to the device and wake-ups of the guest, for each packet",
    ]
    return [table]
