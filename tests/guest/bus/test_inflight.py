# SPDX-License-Identifier: GPL-2.0-or-later
"""Back ends that end amid their work: the next one does what they had taken, once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.devices import Digest, Echo, Noting, Silent
from tests.support.inflight_devices import Keeps, Muddles
from tests.support.paths import TREE
from tests.support.soak import times
from vhostvmbus.channel import Channel, Packet
from vhostvmbus.guest import SoftwareGuest
from vhostvmbus.guest.channel import GuestChannel
from vhostvmbus.guest.errors import CompletionTimeout
from vhostvmbus.guest.inflight import KeptInflight
from vhostvmbus.guest.serving import serving
from vhostvmbus.guest.storvsc import Storvsc
from vhostvmbus.guest.transactions import Transaction
from vhostvmbus.observe.statistics import read_statistics
from vhostvmbus.ring.inflight import SEALS
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import RequestRefused
from vhostvmbus.wire.gpa import GpaRange

DEVICES = TREE / "tests" / "support" / "inflight_devices.py"
KILLS = times(4, 40)
TURNS = times(2, 20)


class Served:
    """A device in a process of its own, at one socket; killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "device.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *words: str) -> None:
        read, write = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vhostvmbus", "serve", *words, "--socket", str(self.path),
             "--ready-fd", str(write)],
            pass_fds=[write], env={**os.environ, "PYTHONPATH": str(TREE)},
        )  # fmt: skip
        os.close(write)
        try:
            assert os.read(read, 1) == b"\n"
        finally:
            os.close(read)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def close(self) -> None:
        if self._process is not None:
            self.kill()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.close()


def kept(guest: SoftwareGuest) -> KeptInflight:
    assert guest._inflight is not None
    return guest._inflight


def wait_until_taken(channel: GuestChannel) -> None:
    """Everything that was sent has left the ring."""
    deadline = time.monotonic() + 10
    while channel.ring.state.tx_free != channel.ring.state.tx_size:
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ---- processes that are killed ----------------------------------------------------------


def test_what_a_killed_back_end_had_taken_is_done_by_the_next(served: Served) -> None:
    """On every channel; in-band and with external data; each completed once."""
    served.start(f"{DEVICES}:Keeps")
    with SoftwareGuest.connect(served.path) as guest:
        channels = [guest.enable(index) for index in range(3)]
        waiting: list[tuple[Transaction, bytes]] = []
        for channel in channels:
            for number in range(100):
                payload = struct.pack("<QQ", channel.index, number)
                waiting.append((channel.submit(payload), payload[::-1]))
            wait_until_taken(channel)
        served.kill()
        served.start(f"{DEVICES}:Muddles")
        guest.reconnect(served.path)
        for transaction, answer in waiting:
            assert transaction.wait() == answer
        for channel in channels:
            assert channel.send(b"goes on.") == b".no seog"
            assert channel.stray_completions == []
        totals = read_statistics(served.path)["totals"]
        assert totals["packets_replayed"] == 300
        assert totals["packets_received"] == totals["completions_sent"] == 303


def test_killed_at_any_moment_under_load(served: Served) -> None:
    """Three channels are kept busy while their back end is killed, over and over."""
    chance = random.Random(5)
    served.start(f"{DEVICES}:Muddles")
    with SoftwareGuest.connect(served.path) as guest:
        channels = [guest.enable(index) for index in range(3)]
        stop = threading.Event()
        done = [0, 0, 0]
        failures: list[BaseException] = []

        def load(channel: GuestChannel) -> None:
            try:
                while not stop.is_set():
                    payloads = [os.urandom(8 * size) for size in range(1, 40)]
                    sent = [channel.submit(payload, timeout=60) for payload in payloads]
                    for transaction, payload in zip(sent, payloads, strict=True):
                        assert transaction.wait(60) == payload[::-1]
                        done[channel.index] += 1
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=load, args=(channel,)) for channel in channels]
        for thread in threads:
            thread.start()
        for _ in range(KILLS):
            before = sum(done)
            time.sleep(chance.random() * 0.2)
            while sum(done) == before and not failures:
                time.sleep(0.001)
            served.kill()
            served.start(f"{DEVICES}:Muddles")
            guest.reconnect(served.path)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures
        assert min(done) > 100
        assert [channel.stray_completions for channel in channels] == [[], [], []]


def test_a_disk_whose_back_end_is_killed(served: Served, tmp_path: Path) -> None:
    """What was written is there, what is read is right, whoever did it."""
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    command = ("scsi", str(image))
    served.start(*command)
    chance = random.Random(6)
    with SoftwareGuest.connect(served.path) as guest:
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        content = bytearray(1 << 20)
        for _ in range(TURNS):
            blocks = chance.sample(range(0, 2048, 8), 60)
            pending = []
            for block in blocks:
                data = chance.randbytes(4096)
                content[block * 512 : block * 512 + 4096] = data
                pending.append(driver.write(block, data))
            served.kill()
            served.start(*command)
            guest.reconnect(served.path)
            for request in pending:
                assert request.wait().good
            reads = [(block, driver.read(block, 8)) for block in blocks]
            served.kill()
            served.start(*command)
            guest.reconnect(served.path)
            for block, request in reads:
                assert request.wait().data == content[block * 512 : block * 512 + 4096]
    assert image.read_bytes() == content


# ---- orderly ends -----------------------------------------------------------------------


class Lets(Silent):
    """Completes every second packet when it has to stop."""

    def suspended(self, channel: Channel) -> None:
        super().suspended(channel)
        for packet in self.packets[::2]:
            packet.complete(b"at last.")


def test_what_an_orderly_end_completed_is_not_done_again() -> None:
    first, second = Lets(), Silent()
    with SoftwareGuest.for_device(first) as guest, serving(second) as (_, path, host):
        channel = guest.enable()
        sent = [channel.submit(struct.pack("<Q", number)) for number in range(10)]
        for _ in sent:
            assert first.arrived.acquire(timeout=10)
        guest.reconnect(path)
        for transaction in sent[::2]:
            assert transaction.wait() == b"at last."
        for _ in sent[1::2]:
            assert second.arrived.acquire(timeout=10)
        assert [packet.payload[0] for packet in second.packets] == [1, 3, 5, 7, 9]
        assert all(packet.replayed for packet in second.packets)
        assert second.events == ["resumed 0"]
        assert host.stats()["totals"]["packets_replayed"] == 5
        for packet in second.packets:
            packet.complete(b"done too")
        assert [transaction.wait() for transaction in sent[1::2]] == [b"done too"] * 5
        fresh = channel.submit(b"a fresh.")
        assert second.arrived.acquire(timeout=10)
        assert not second.packets[-1].replayed
        second.packets[-1].complete()
        assert fresh.wait() == b""
        assert channel.stray_completions == []
        guest.disconnect()


def test_the_same_back_end_comes_back() -> None:
    device = Silent()
    with serving(device) as (_, path, _), SoftwareGuest.connect(path) as guest:
        channel = guest.enable()
        sent = channel.submit(b"again...")
        for turn in range(5):
            assert device.arrived.acquire(timeout=10)
            assert device.packets[-1].replayed == (turn > 0)
            guest.reconnect(path)
        assert device.arrived.acquire(timeout=10)
        device.packets[-1].complete(b"finally.")
        assert sent.wait() == b"finally."
        assert channel.stray_completions == []


def test_rejected_packets_are_rejected_again() -> None:
    class Holding(Digest):
        def packet_rejected(self, channel: Channel, packet: Packet, error: Exception) -> None:
            arrived.release()

    arrived = threading.Semaphore(0)
    second = Digest()
    with SoftwareGuest.for_device(Holding()) as guest, serving(second) as (_, path, _):
        channel = guest.enable()
        sent = channel.submit_with_external_ranges(b"nowhere.", [GpaRange(4096, 0, [1 << 40])])
        assert arrived.acquire(timeout=10)
        guest.reconnect(path)
        assert sent.wait() == Digest.REJECTED
        assert [type(error).__name__ for error in second.rejections] == ["PfnOutsideMemory"]
        guest.disconnect()


# ---- what is forgotten ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "reset"])
def test_what_the_guest_gave_up_is_not_done_again(how: str) -> None:
    first, second = Silent(), Echo()
    with SoftwareGuest.for_device(first) as guest, serving(second) as (_, path, host):
        channel = guest.enable()
        channel.submit(b"given up")
        assert first.arrived.acquire(timeout=10)
        if how == "reset":
            guest.reset()
        else:
            guest.disable()
        channel = guest.enable()
        guest.reconnect(path)
        assert channel.send(b"goes on.") == b"goes on."
        assert host.stats()["totals"]["packets_replayed"] == 0
        assert channel.stray_completions == []
        guest.disconnect()


def test_closed_while_there_is_no_back_end() -> None:
    """The part is what the lost back end left; the new opening begins with nothing."""
    first, second = Silent(), Echo()
    with SoftwareGuest.for_device(first) as guest, serving(second) as (_, path, host):
        guest.enable().submit(b"given up")
        assert first.arrived.acquire(timeout=10)
        guest.disconnect()
        guest.disable()
        guest.reconnect(path)
        channel = guest.enable()
        assert channel.send(b"goes on.") == b"goes on."
        assert host.stats()["totals"]["packets_replayed"] == 0
        guest.disconnect()


class Counts(Noting):
    """Counts what comes, and completes it."""

    def __init__(self) -> None:
        super().__init__()
        self.replayed = 0

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        self.replayed += packet.replayed
        packet.complete()


def test_a_channel_that_is_closed_at_once_has_done_them_before() -> None:
    """A guest may close because of what it waits for: its packets are completed first."""
    for _ in range(4):
        first, second = Silent(), Counts()
        with SoftwareGuest.for_device(first) as guest, serving(second) as (_, path, _):
            channel = guest.enable()
            for number in range(200):
                channel.submit(struct.pack("<Q", number))
            wait_until_taken(channel)
            guest.reconnect(path)
            guest.disable()
            assert second.replayed == 200
            guest.disconnect()


# ---- limits -----------------------------------------------------------------------------


class Raises(Silent):
    """Takes more packets at a time than it said."""

    transaction_quota = 4

    def opened(self, channel: Channel) -> None:
        super().opened(channel)
        channel.transaction_quota = 64


def test_more_packets_than_slots() -> None:
    device = Raises()
    with SoftwareGuest.for_device(device) as guest:
        channel = guest.enable()
        sent = [channel.submit(struct.pack("<Q", number)) for number in range(50)]
        for number in range(50):
            assert device.arrived.acquire(timeout=10)
            assert len(device.packets) - number <= 4
            device.packets[number].complete(device.packets[number].payload)
        for number, transaction in enumerate(sent):
            assert transaction.wait() == struct.pack("<Q", number)


# ---- what makes no sense ----------------------------------------------------------------


@contextlib.contextmanager
def sealed(size: int) -> Iterator[int]:
    fd = os.memfd_create("region", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    try:
        yield fd
    finally:
        os.close(fd)


def test_regions_that_can_be_none_are_refused_and_all_goes_on() -> None:
    with SoftwareGuest.for_device(Echo()) as guest, sealed(1 << 16) as fd:
        for message in (
            m.SetInflightFd(0, 0, 0, 0),
            m.SetInflightFd(1 << 40, 0, 1, 8),
            m.SetInflightFd(1 << 16, 0, 0xFFFF, 0xFFFF),
            m.SetInflightFd(1 << 16, 8, 1, 8),
            m.SetInflightFd(1 << 16, 1 << 16, 1, 8),
        ):
            with pytest.raises(RequestRefused):
                guest.front_end.request(message, [fd])
        eventfd = os.eventfd(0)
        with pytest.raises(RequestRefused):
            guest.front_end.request(m.SetInflightFd(1 << 16, 0, 1, 8), [eventfd])
        os.close(eventfd)
        assert guest.enable().send(b"goes on.") == b"goes on."


def test_not_while_a_channel_is_open() -> None:
    with SoftwareGuest.for_device(Echo()) as guest, sealed(1 << 16) as fd:
        channel = guest.enable()
        with pytest.raises(RequestRefused):
            guest.front_end.request(m.SetInflightFd(1 << 16, 0, 1, 8), [fd])
        answer, fds = guest.front_end.request_with_fds(m.GetInflightFd(0, 0, 1, 0))
        assert (answer, fds) == (m.InflightReply(0, 0, 0, 0), ())
        assert channel.send(b"goes on.") == b"goes on."


@pytest.mark.parametrize("seed", range(8))
def test_a_region_with_anything_in_it(seed: int) -> None:
    """It is reported and not used, or used as far as it makes sense; the channel goes on."""
    chance = random.Random(seed)
    first, second = Silent(), Counts()
    with SoftwareGuest.for_device(first) as guest, serving(second) as (_, path, host):
        channel = guest.enable()
        lost = [channel.submit(struct.pack("<Q", number)) for number in range(20)]
        for _ in lost:
            assert first.arrived.acquire(timeout=10)
        guest.disconnect()
        fd = kept(guest).fd
        start = 64 if seed < 4 else 4096  # without the head's first fields, or only slots
        os.pwrite(fd, chance.randbytes(4096), start)
        guest.reconnect(path)
        assert channel.send(b"goes on.") == b""
        assert host.stats()["inflight_errors"] >= (seed < 4)
        for transaction in lost:
            with contextlib.suppress(CompletionTimeout):
                transaction.wait(0.01)
        # and from now on all is recorded again
        assert second.replayed <= 20
        guest.disconnect()


def test_what_comes_after_a_broken_region_is_recorded() -> None:
    first, second, third = Silent(), Silent(), Echo()
    with (
        SoftwareGuest.for_device(first) as guest,
        serving(second) as (_, path, host),
        serving(third) as (_, next_path, _),
    ):
        channel = guest.enable()
        lost = channel.submit(b"is lost.")
        assert first.arrived.acquire(timeout=10)
        guest.disconnect()
        os.pwrite(kept(guest).fd, b"nonsense", 0)
        guest.reconnect(path)
        kept_one = channel.submit(b"is kept.")
        assert second.arrived.acquire(timeout=10)
        assert host.stats()["inflight_errors"] == 1
        assert [packet.payload for packet in second.packets] == [b"is kept."]
        guest.reconnect(next_path)
        assert kept_one.wait() == b"is kept."
        assert not lost.done
        guest.disconnect()


def test_nothing_is_kept_past_a_back_end_that_does_not_record() -> None:
    """Its rings went on without the region, which is about another time."""

    class Without:
        features = m.REQUIRED_FEATURES

    with SoftwareGuest.for_device(Echo()) as guest:
        region = kept(guest)
        assert region.fd >= 0
        region.share(Without(), 1)  # type: ignore[arg-type]
        assert (region.fd, region.reply) == (-1, None)


def test_the_devices_of_the_tests_have_one_offer() -> None:
    assert (Keeps.class_id, Keeps.max_channels) == (Muddles.class_id, Muddles.max_channels)
