# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans: what the engine does by itself, what it leaves alone, and in which order."""

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.devices import TestDevice
from tests.support.ram import BASE_PFN, Ram
from tests.support.raw_channel import raw_channel
from tests.support.rings import ring_pair
from tests.support.soak import examples
from tests.support.waiting import eventually
from vhostvmbus.memory import GuestMemory
from vhostvmbus.ring import Number, Operation, Plan, Ring, Role, Rule, Sent
from vhostvmbus.wire.errors import GuestMemoryLost, RingMemoryLost
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.vmbus import PAGE_SIZE, PacketType

SIZE = 64 * 512
CONTENT = bytes(i * 7 + (i >> 8) * 13 & 0xFF for i in range(SIZE))
DATA_PFN = BASE_PFN + 64


def request(lba: int = 0, blocks: int = 1, *, room: int = 65536, op: bytes = b"READ") -> bytes:
    """32 bytes: operation, room u32 LE, LBA u64 BE, blocks u32 BE, u32 echoed, done u64 LE."""
    return (
        op
        + room.to_bytes(4, "little")
        + lba.to_bytes(8, "big")
        + blocks.to_bytes(4, "big")
        + b"\x11\x22\x33\x44"
        + b"\xee" * 8
    )


def answer(length: int) -> bytes:
    """The completion of a request that was done."""
    return b"DONE" + bytes(16) + b"\x11\x22\x03\x44" + length.to_bytes(8, "little")


def rule(fd: int, **changes: Any) -> Rule:
    """READ and WRITE of the requests above."""
    base = Rule(
        operation=Operation.READ,
        fd=fd,
        file_size=SIZE,
        max_length=SIZE // 2,
        payload_length=32,
        mask=b"\xff" * 4,
        value=b"READ",
        position=Number(8, 8, big_endian=True, shift=9),
        length=Number(16, 4, big_endian=True, shift=9),
        room=Number(4, 4),
        keep=bytes(20) + b"\xff\xff\x0f\xff",
        set=b"DONE",
        done=Number(24, 8),
    )
    return replace(base, **changes)


class Rig:
    """Both ends of a channel, and a file with a plan for it."""

    def __init__(self) -> None:
        self.ram = Ram()
        self.memory = self.ram.memory()
        self.guest, self.host = ring_pair(self.memory, 8, 8)
        self.fd = os.memfd_create("disk", os.MFD_CLOEXEC)
        os.pwrite(self.fd, CONTENT, 0)
        write = rule(self.fd, operation=Operation.WRITE, value=b"WRIT")
        self.plan = Plan([rule(self.fd), write])
        self.tid = 0

    def send(
        self, payload: bytes, size: int = 4096, *, pfn: int = DATA_PFN, flags: int = 1
    ) -> None:
        self.tid += 1
        pfns = list(range(pfn, pfn + -(-size // PAGE_SIZE)))
        self.guest.send_gpa_direct(
            payload, [GpaRange(size, 0, pfns)], transaction_id=self.tid, flags=flags
        ).check()

    def page(self, pfn: int = DATA_PFN, size: int = 4096) -> bytes:
        return self.ram.peek(pfn * PAGE_SIZE, size)

    def file(self) -> bytes:
        return os.pread(self.fd, SIZE + 4096, 0)

    def close(self) -> None:
        for ring in (self.guest, self.host):
            ring.close()
        self.memory.close()
        self.ram.close()
        os.close(self.fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_a_read_that_fits_is_done(rig: Rig) -> None:
    rig.ram.poke(DATA_PFN * PAGE_SIZE, b"\xaa" * 8192)
    rig.send(request(3, 9), 8192)
    batch = rig.host.receive(plan=rig.plan)
    assert (batch.packets, batch.error) == ([], None)
    done = batch.done
    assert done is not None
    assert (done.completions, done.payload_bytes, done.external_bytes) == (1, 32, 8192)
    assert done.written() == [(DATA_PFN * PAGE_SIZE, 9 * 512)]
    assert rig.page(size=8192) == CONTENT[3 * 512 : 12 * 512] + b"\xaa" * (8192 - 9 * 512)
    assert rig.guest.receive().packets == [], "nothing is published before it is sent"
    assert rig.host.send_many(done) == Sent(1, True)
    (completion,) = rig.guest.receive().packets
    assert (completion.type, completion.flags) == (PacketType.COMP, 0)
    assert (completion.transaction_id, completion.payload) == (1, answer(9 * 512))
    assert rig.host.receive(plan=rig.plan).done is None
    assert rig.memory.regions[0].users == 0


def test_a_write_that_fits_is_done(rig: Rig) -> None:
    rig.ram.poke(DATA_PFN * PAGE_SIZE, b"w" * 512)
    rig.send(request(63, 1, op=b"WRIT"))
    done = rig.host.receive(plan=rig.plan).done
    assert done is not None
    assert done.written() == [], "the guest's memory was only read"
    assert rig.file() == CONTENT[: 63 * 512] + b"w" * 512


def test_without_a_plan_the_same_packet_goes_up(rig: Rig) -> None:
    rig.send(request(0, 1))
    batch = rig.host.receive()
    assert batch.done is None
    assert len(batch.packets) == 1


UNFIT = {
    "another operation": (request(op=b"REAd"), 4096),
    "shorter payload": (request()[:24], 4096),
    "longer payload": (request() + bytes(8), 4096),
    "payload longer than any rule's": (request() + bytes(48), 4096),
    "nothing to do": (request(0, 0), 4096),
    "more than the external data": (request(0, 8), 8 * 512 - 1),
    "more than the room": (request(0, 8, room=8 * 512 - 1), 4096),
    "more than allowed": (request(0, 33), 65536),
    "one block beyond the end": (request(57, 8), 4096),
    "behind the end": (request(64, 1), 4096),
    "far behind": (request(1 << 40, 1), 4096),
    "LBA times 512 is 0 in 64 bits": (request(1 << 55, 1), 4096),
    "LBA times 512 wraps": (request((1 << 64) - 1, 2), 4096),
    "the end wraps": (request((1 << 55) - 1, 1), 4096),
}


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_goes_up_untouched(rig: Rig, name: str, write: bool) -> None:
    payload, size = UNFIT[name]
    if write:
        payload = payload.replace(b"READ", b"WRIT")
    rig.ram.poke(DATA_PFN * PAGE_SIZE, b"\xaa" * 4096)
    rig.send(payload, size)
    batch = rig.host.receive(plan=rig.plan)
    assert batch.done is None
    (packet,) = batch.packets
    assert packet.payload == payload
    assert packet.external_data is not None
    assert (len(packet.external_data), packet.external_data.written) == (size, [])
    assert rig.file() == CONTENT
    assert rig.page() == b"\xaa" * 4096


def test_other_kinds_of_packets_go_up(rig: Rig) -> None:
    rig.guest.send(PacketType.DATA_INBAND, request(), transaction_id=1, flags=1).check()
    rig.send(request(), flags=0)
    rig.guest.send_gpa_direct(request(), [GpaRange(4096, 0, [1])], transaction_id=3).check()
    batch = rig.host.receive(plan=rig.plan)
    assert batch.done is None
    assert [packet.type for packet in batch.packets] == [6, 9, 9]
    assert batch.packets[2].error is not None


@pytest.mark.parametrize("op", [b"READ", b"WRIT"])
def test_what_the_host_refuses_goes_up(rig: Rig, op: bytes) -> None:
    closed = os.dup(rig.fd)
    os.close(closed)
    both = [rule(closed), rule(closed, operation=Operation.WRITE, value=b"WRIT")]
    rig.send(request(op=op))
    batch = rig.host.receive(plan=Plan(both))
    assert batch.done is None
    (packet,) = batch.packets
    assert packet.external_data is not None
    assert packet.external_data.preadv(rig.fd, 512, 0, 512) == 512
    assert rig.page(size=512) == CONTENT[512:1024]


def test_a_short_read_goes_up_with_what_it_wrote(rig: Rig) -> None:
    os.ftruncate(rig.fd, 5 * 512)
    rig.send(request(3, 8))
    batch = rig.host.receive(plan=rig.plan)
    assert batch.done is None
    (packet,) = batch.packets
    assert packet.external_data is not None
    # The pages have changed: the code map and the dirty log must hear of it whatever comes now.
    assert packet.external_data.written == [(DATA_PFN * PAGE_SIZE, 8 * 512)]


def test_a_read_only_file_is_not_written(rig: Rig) -> None:
    fd = os.open(f"/proc/self/fd/{rig.fd}", os.O_RDONLY)
    plan = Plan([rule(fd, operation=Operation.WRITE, value=b"WRIT")])
    rig.send(request(op=b"WRIT"))
    batch = rig.host.receive(plan=plan)
    os.close(fd)
    assert (batch.done, len(batch.packets)) == (None, 1)
    assert rig.file() == CONTENT


def test_memory_that_is_lost_goes_up(rig: Rig) -> None:
    lost = Ram(pages=4, base=0x4000000)
    rig.memory.add_region(lost.base, lost.size, lost.fd)
    rig.send(request(op=b"WRIT"), pfn=lost.base // PAGE_SIZE)
    os.ftruncate(lost.fd, 0)
    (packet,) = rig.host.receive(plan=rig.plan).packets
    assert packet.external_data is not None
    with pytest.raises(GuestMemoryLost):
        packet.external_data.read()
    assert rig.file() == CONTENT
    packet.external_data.close()
    lost.close()


def test_nothing_overtakes_a_packet_that_does_not_fit(rig: Rig) -> None:
    """Fits: 1, 2, 5, 7. They stay in the ring as long as one before them has not been handed up."""
    for fits in (True, True, False, False, True, False, True):
        rig.send(request(0, 1 if fits else 99))
    seen = []
    for _ in range(4):
        batch = rig.host.receive(plan=rig.plan)
        done = batch.done.outgoing(0) if batch.done else []
        seen.append(([p.transaction_id for p in done], [p.transaction_id for p in batch.packets]))
    assert seen == [([1, 2], [3, 4]), ([5], [6]), ([7], []), ([], [])]


def test_what_fits_and_fails_holds_up_nothing(rig: Rig) -> None:
    os.ftruncate(rig.fd, 512)
    for lba in (0, 1, 0, 1, 0):
        rig.send(request(lba))
    batch = rig.host.receive(plan=rig.plan)
    assert batch.done is not None
    assert [packet.transaction_id for packet in batch.done.outgoing(0)] == [1, 3, 5]
    assert [packet.transaction_id for packet in batch.packets] == [2, 4]


def test_a_file_that_was_cut_off_does_not_grow_again(rig: Rig) -> None:
    """It is not for the engine to do: the device finds out, and says so."""
    os.ftruncate(rig.fd, SIZE - 1)
    rig.send(request(0, op=b"WRIT"))
    rig.send(request(SIZE // 512 - 1, op=b"WRIT"))
    batch = rig.host.receive(plan=rig.plan)
    assert batch.done is None
    assert [packet.transaction_id for packet in batch.packets] == [1, 2]
    assert os.fstat(rig.fd).st_size == SIZE - 1
    os.ftruncate(rig.fd, SIZE)
    rig.send(request(0, op=b"WRIT"))
    assert rig.host.receive(plan=rig.plan).done is not None


def test_a_batch_is_bounded(rig: Rig) -> None:
    for i in range(40):
        rig.send(request(i))
    counts = [done.completions for _ in range(3) if (done := rig.host.receive(plan=rig.plan).done)]
    assert counts == [16, 16, 8]
    rig.send(request(0))
    rig.send(request(0))
    done = rig.host.receive(1, rig.plan).done
    assert done is not None
    assert done.completions == 1, "max_packets counts them too"


def test_completions_that_do_not_fit_into_the_ring(rig: Rig) -> None:
    guest, host = ring_pair(rig.memory, 8, 2, BASE_PFN + 32)
    rig.guest.close()
    rig.guest = guest
    while True:
        sent = host.send_many([])
        if host.state.tx_free < 200:
            break
        host.send(PacketType.DATA_INBAND, bytes(64)).check()
    assert sent == Sent(0, False)
    for i in range(10):
        rig.send(request(i))
    done = host.receive(plan=rig.plan).done
    assert done is not None
    sent = host.send_many(done)
    assert sent.full
    assert sent.entered < done.completions == 10
    rest = done.outgoing(sent.entered)
    assert [packet.transaction_id for packet in rest] == list(range(sent.entered + 1, 11))
    assert {packet.payload for packet in rest} == {answer(512)}
    guest.receive()
    assert host.send_many(rest).entered == len(rest)
    host.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"payload_length": 0},
        {"payload_length": 30},
        {"payload_length": 72},
        {"fd": -1},
        {"operation": 2},
        {"file_size": 1 << 63},
        {"max_length": 0},
        {"mask": bytes(65)},
        {"value": b"READ!"},
        {"mask": bytes(32) + b"\1"},
        {"keep": bytes(32) + b"\1"},
        {"set": bytes(32) + b"\1"},
        {"position": Number(8, 3)},
        {"position": Number(8, 0)},
        {"position": Number(25, 8)},
        {"position": Number(0xFFFF, 8)},
        {"position": Number(-1, 8)},
        {"length": Number(8, 8, shift=64)},
        {"length": Number(8, 8, shift=256)},
        {"room": Number(31, 2)},
        {"done": Number(24, 1)},
        {"done": Number(24, 2, shift=-1)},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sense|range|bytes"):
        Plan([rule(0), replace(rule(0), **changes)])


@settings(max_examples=examples(200), deadline=None)
@given(st.data())
def test_any_payload_is_done_exactly_if_it_should_be(data: st.DataObject) -> None:
    """Against the same rules in Python."""
    big = st.one_of(st.integers(0, 70), st.integers(0, (1 << 64) - 1), st.just(1 << 55))
    lba = data.draw(big)
    blocks = data.draw(st.one_of(st.integers(0, 70), st.integers(0, (1 << 32) - 1)))
    room = data.draw(st.one_of(st.integers(0, 40000), st.just((1 << 32) - 1)))
    size = data.draw(st.integers(1, 40000))
    op = data.draw(st.sampled_from([b"READ", b"WRIT", b"RE\0D"]))
    length = blocks * 512
    good = (
        op != b"RE\0D" and 0 < length <= min(SIZE // 2, size, room) and lba * 512 + length <= SIZE
    )
    rig = Rig()
    try:
        rig.ram.poke(DATA_PFN * PAGE_SIZE, b"\x55" * 40960)
        rig.send(request(lba, blocks, room=room, op=op), size)
        batch = rig.host.receive(plan=rig.plan)
        assert (batch.done is not None) == good
        assert len(batch.packets) == (not good)
        for packet in batch.packets:
            assert packet.external_data is not None
            packet.external_data.close()
        expected, pages = CONTENT, b"\x55" * 40960
        if good and op == b"READ":
            pages = CONTENT[lba * 512 :][:length] + pages[length:]
        elif good:
            expected = CONTENT[: lba * 512] + b"\x55" * length + CONTENT[lba * 512 + length :]
        assert rig.file() == expected
        assert rig.page(size=40960) == pages
    finally:
        rig.close()


# -- a channel with a plan -----------------------------------------------------------------------


def test_counters_and_order_of_a_channel() -> None:
    seen = []

    def on_packet(channel: Any, packet: Any) -> None:
        seen.append(channel.stats.packets_planned)
        packet.complete(b"python..")

    fd = os.memfd_create("disk", os.MFD_CLOEXEC)
    os.pwrite(fd, CONTENT, 0)
    with raw_channel(TestDevice(on_packet)) as guest:
        guest.channel.set_plan(Plan([rule(fd)]))
        pages = [GpaRange.of_pages([DATA_PFN])]
        for turn in range(30):
            guest.send_direct(request(turn), pages, transaction_id=turn + 1)
            guest.send_direct(request(turn, 99), pages, transaction_id=100 + turn)
        done = {packet.transaction_id: packet.payload for packet in guest.expect(60)}
        assert done == {i + 1: answer(512) for i in range(30)} | {
            100 + i: b"python.." for i in range(30)
        }
        assert seen == list(range(1, 31)), "each came up after what was before it and no later"
        stats = guest.channel.stats
        assert (stats.packets_received, stats.packets_planned) == (60, 30)
        assert (stats.completions_sent, stats.bytes_received) == (60, 60 * 32)
        assert stats.external_bytes == 60 * 4096
        assert guest.channel.outstanding == 0
        guest.channel.set_plan(None)
        guest.send_direct(request(0), pages)
        assert guest.expect()[0].payload == b"python.."
    os.close(fd)


def test_a_guest_that_takes_no_completions_gets_them_all_later() -> None:
    fd = os.memfd_create("disk", os.MFD_CLOEXEC)
    os.pwrite(fd, CONTENT, 0)
    device = TestDevice()
    device.transaction_quota = 150
    with raw_channel(device, in_pages=2, out_pages=16) as guest:
        guest.channel.set_plan(Plan([rule(fd)]))
        pages = [GpaRange.of_pages([DATA_PFN])]
        for i in range(300):
            guest.send_direct(request(i % 64), pages, transaction_id=i + 1)
        eventually(lambda: guest.channel.stats.ring_full and guest.channel.outstanding >= 100)
        assert guest.channel.outstanding <= 150
        done = guest.expect(300)
        assert [packet.transaction_id for packet in done] == list(range(1, 301))
        assert {packet.payload for packet in done} == {answer(512)}
    os.close(fd)


def test_a_plan_that_was_withdrawn_touches_nothing_any_more() -> None:
    """The descriptor is another file's as soon as set_plan() has returned."""
    fd, other = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("disk", "other"))
    os.pwrite(fd, CONTENT, 0)
    mine = os.dup(fd)
    stop = threading.Event()
    with raw_channel(TestDevice()) as guest:
        pages = [GpaRange.of_pages([DATA_PFN + i for i in range(16)])]
        plan = Plan([rule(fd, operation=Operation.WRITE, value=b"WRIT")])

        def traffic() -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                guest.send_direct(request(0, 32, op=b"WRIT"), pages, transaction_id=turn)
                guest.expect()

        thread = threading.Thread(target=traffic)
        thread.start()
        for _ in range(300):
            guest.channel.set_plan(plan)
            planned = guest.channel.stats.packets_planned
            eventually(lambda before=planned: guest.channel.stats.packets_planned > before)
            guest.channel.set_plan(None)
            os.dup2(other, fd)
            assert os.fstat(other).st_size == 0
            os.dup2(mine, fd)
        stop.set()
        thread.join()
        assert os.fstat(other).st_size == 0
    for each in (fd, other, mine):
        os.close(each)


def test_a_ring_to_the_guest_that_is_lost_is_reported_though_a_plan_does_everything() -> None:
    memory = GuestMemory()
    disk, out, back = (os.memfd_create(name, os.MFD_CLOEXEC) for name in ("disk", "out", "back"))
    os.pwrite(disk, CONTENT, 0)
    for gpa, fd in ((0, out), (1 << 20, back)):
        os.ftruncate(fd, 1 << 20)
        memory.add_region(gpa, 1 << 20, fd)
    pfns = [0, 1, 2, 3, 256, 257, 258, 259]
    guest = Ring(memory, pfns, 4, Role.GUEST, initialize=True)
    host = Ring(memory, pfns, 4, Role.HOST)
    host.mask()
    guest.send_gpa_direct(request(0), [GpaRange(512, 0, [16])], transaction_id=1).check()
    os.ftruncate(back, 0)
    kick, stop, wake, call = (os.eventfd(n, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for n in (0, 1, 0, 0))
    batch, _ = host.serve(64, Plan([rule(disk)]), [kick, stop, wake, call])
    assert isinstance(batch.error, RingMemoryLost)
    guest.close()
    host.close()
    for fd in (disk, out, back, kick, stop, wake, call):
        os.close(fd)


def test_a_plan_that_is_stopped_begins_nothing(rig: Rig) -> None:
    rig.send(request(1))
    rig.host.stop_plan()
    batch = rig.host.receive(plan=rig.plan)
    assert batch.done is None
    (packet,) = batch.packets
    assert packet.external_data is not None
    packet.external_data.close()


def test_plans_do_not_disturb_each_others_rings(rig: Rig) -> None:
    """A plan belongs to nobody: two rings may use one."""
    guest, host = ring_pair(rig.memory, 2, 2, BASE_PFN + 32)
    rig.send(request(1))
    guest.send_gpa_direct(request(2), [GpaRange(512, 0, [DATA_PFN + 1])], transaction_id=9).check()
    first, second = rig.host.receive(plan=rig.plan).done, host.receive(plan=rig.plan).done
    assert first is not None
    assert second is not None
    assert [p.transaction_id for p in first.outgoing(0) + second.outgoing(0)] == [1, 9]
    for ring in (guest, host):
        ring.close()
