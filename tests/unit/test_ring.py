# SPDX-License-Identifier: GPL-2.0-or-later
"""The ring engine, both roles on the same pages: order, wrap-around, full rings, signals."""

import os
import threading
from collections.abc import Iterator

import pytest
from core_support import BASE, BASE_PFN, PAGES, Ram, ring_pair, scattered
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostvmbus.memory import GuestMemory
from vhostvmbus.ring import Limits, Ring, Role, is_eventfd, signal, wait
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.vmbus import (
    PAGE_SIZE,
    RING_FEATURE_BITS,
    RING_INTERRUPT_MASK,
    RING_PENDING_SEND_SZ,
    RING_READ_INDEX,
    RING_WRITE_INDEX,
    PacketType,
    align8,
)

INBAND, COMP = PacketType.DATA_INBAND, PacketType.COMP


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = Ram()
    memory = ram.memory()
    yield memory
    memory.close()
    ram.close()


def word(ring: Ring, sending: bool, offset: int) -> int:
    return int.from_bytes(ring.pages(sending)[offset : offset + 4], "little")


def set_word(ring: Ring, sending: bool, offset: int, value: int) -> None:
    ring.pages(sending)[offset : offset + 4] = value.to_bytes(4, "little")


# -- attach --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "split"), [(0, 0), (4, 0), (4, 1), (4, 3), (4, 4), (3, 2), (4, 5), (4, 1 << 31)]
)
def test_a_split_that_makes_no_two_rings_is_refused(
    memory: GuestMemory, pages: int, split: int
) -> None:
    with pytest.raises(errors.RingInvalid):
        Ring(memory, scattered(pages), split)


def test_pages_outside_memory_are_refused(memory: GuestMemory) -> None:
    for bad in (BASE_PFN + PAGES, 0, (1 << 64) - 1, (1 << 52) + BASE_PFN):
        with pytest.raises(errors.RingInvalid) as caught:
            Ring(memory, [BASE_PFN, BASE_PFN + 1, BASE_PFN + 2, bad], 2)
        assert isinstance(caught.value.__cause__, errors.PfnOutsideMemory)


@pytest.mark.parametrize("index", [4, 4096, 8192, 0xFFFFFFF8])
def test_indices_that_are_none_are_refused_at_the_start(memory: GuestMemory, index: int) -> None:
    guest, host = ring_pair(memory)
    host.close()
    set_word(guest, True, RING_READ_INDEX, index)
    with pytest.raises(errors.RingInvalid) as caught:
        Ring(memory, scattered(4), 2)
    assert isinstance(caught.value.__cause__, errors.RingIndexInvalid)
    assert caught.value.__cause__.value == index


def test_each_side_announces_pending_send_size_where_it_produces(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    assert word(guest, True, RING_FEATURE_BITS) == 1
    assert word(host, True, RING_FEATURE_BITS) == 1
    assert guest.state.peer_signals_space
    assert host.state.peer_signals_space


def test_a_ring_goes_on_from_the_indices_in_its_headers(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    for transaction in range(5):
        guest.send(INBAND, b"x" * 40, transaction_id=transaction)
    assert [p.transaction_id for p in host.receive(2).packets] == [0, 1]
    host.send(COMP, transaction_id=0)
    host.close()
    again = Ring(memory, scattered(4), 2)
    assert [p.transaction_id for p in again.receive().packets] == [2, 3, 4]
    again.send(COMP, transaction_id=1)
    assert [p.transaction_id for p in guest.receive().packets] == [0, 1]


def test_the_largest_rings(memory: GuestMemory) -> None:
    # 4 MiB each way would need 2050 pages; the same page may serve many times in a test
    pfns = [BASE_PFN + i % PAGES for i in range(2 * 1025)]
    ring = Ring(memory, pfns, 1025)
    assert ring.state.rx_size == ring.state.tx_size == 4 << 20
    ring.close()


def test_a_closed_ring_says_so(memory: GuestMemory) -> None:
    guest, _ = ring_pair(memory)
    guest.close()
    guest.close()
    for call in (
        guest.receive,
        guest.mask,
        guest.unmask,
        guest.publish,
        lambda: guest.send(INBAND),
        lambda: guest.state,
        lambda: guest.lost,
    ):
        with pytest.raises(errors.ChannelClosed):
            call()


# -- packets -------------------------------------------------------------------------------------


def test_a_packet_crosses_each_way(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    guest.send(INBAND, b"question", transaction_id=1 << 63, flags=1)
    (packet,) = host.receive().packets
    assert (packet.type, packet.flags, packet.transaction_id) == (INBAND, 1, 1 << 63)
    assert (packet.payload, packet.completion_requested) == (b"question", True)
    assert packet.external_data is None
    host.send(COMP, bytearray(b"answer"), transaction_id=1 << 63)
    (packet,) = guest.receive().packets
    assert (packet.type, packet.payload) == (COMP, b"answer\0\0")


def test_payloads_are_copied_when_they_are_sent(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    buffer = bytearray(b"original")
    guest.send(INBAND, buffer)
    buffer[:] = b"changed!"
    assert host.receive().packets[0].payload == b"original"


def test_every_wrap_offset(memory: GuestMemory) -> None:
    payload = bytes(range(40))
    for start in range(0, PAGE_SIZE, 8):
        guest, host = ring_pair(memory)
        for ring, sending in ((guest, True), (host, True)):
            set_word(ring, sending, RING_WRITE_INDEX, start)
            set_word(ring, sending, RING_READ_INDEX, start)
        guest.close()
        host.close()
        guest = Ring(memory, scattered(4), 2, Role.GUEST)
        host = Ring(memory, scattered(4), 2)
        guest.send_gpa_direct(payload, [GpaRange(5000, 8, [BASE_PFN + 9, BASE_PFN + 20])])
        (packet,) = host.receive().packets
        assert packet.payload == payload
        assert packet.ring_offset == start
        assert packet.external_data is not None
        assert packet.external_data.segments == [
            (BASE + 9 * 4096 + 8, 4088),
            (BASE + 20 * 4096, 912),
        ]
        host.send(COMP, payload, transaction_id=start)
        (packet,) = guest.receive().packets
        assert (packet.payload, packet.transaction_id) == (payload, start)
        guest.close()
        host.close()


def test_trailers_say_where_the_packet_started(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    guest.send(INBAND, b"x" * 8)
    guest.send(INBAND, b"y" * 8)
    data = bytes(guest.pages(True)[PAGE_SIZE:])
    assert data[24:32] == bytes(8)
    assert data[56:64] == (32 << 32).to_bytes(8, "little")
    assert len(host.receive().packets) == 2


def test_gpa_direct_ranges_arrive(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    ranges = [GpaRange(100, 4000, [BASE_PFN + 1, BASE_PFN + 2]), GpaRange.of_pages([BASE_PFN + 7])]
    guest.send_gpa_direct(b"command!", ranges, transaction_id=5)
    (packet,) = host.receive().packets
    assert packet.payload == b"command!"
    assert packet.external_data is not None
    assert len(packet.external_data) == 4196
    assert [(r.byte_count, r.byte_offset, list(r.pfns)) for r in packet.external_data.ranges] == [
        (r.byte_count, r.byte_offset, r.pfns) for r in ranges
    ]
    # 1 and 2 are neighbours, so the first range is one segment
    assert packet.external_data.segments == [(BASE + 4096 + 4000, 100), (BASE + 7 * 4096, 4096)]


def test_room_behind_the_ranges_is_allowed(memory: GuestMemory) -> None:
    # storvsc of Linux 6.1 always sends room for 32 PFNs
    guest, host = ring_pair(memory)
    header = bytes(4) + (1).to_bytes(4, "little")
    header += (512).to_bytes(4, "little") + bytes(4) + BASE_PFN.to_bytes(8, "little")
    guest.send(PacketType.DATA_USING_GPA_DIRECT, b"srb", header=header + bytes(31 * 8))
    (packet,) = host.receive().packets
    assert packet.error is None
    assert packet.payload == b"srb".ljust(8, b"\0")
    assert packet.external_data is not None
    assert packet.external_data.segments == [(BASE, 512)]


def test_the_batch_is_bounded(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    for i in range(20):
        guest.send(INBAND, transaction_id=i)
    assert len(host.receive(7).packets) == 7
    assert len(host.receive(0).packets) == 0
    assert [p.transaction_id for p in host.receive(64).packets] == list(range(7, 20))
    assert host.receive().packets == []


def test_packets_that_can_never_fit(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    guest.send(INBAND, bytes(4096 - 16 - 8 - 8))
    assert len(host.receive().packets[0].payload) == 4064
    with pytest.raises(errors.PacketTooBig):
        guest.send(INBAND, bytes(4096 - 16 - 8 - 7))
    big = Ring(memory, scattered(400), 200, Role.GUEST, initialize=True)
    big.send(INBAND, bytes(0xFFFF * 8 - 16))
    with pytest.raises(errors.PacketTooBig):
        big.send(INBAND, bytes(0xFFFF * 8 - 15))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.integers(0, 700)),
            st.tuples(st.just("receive"), st.integers(1, 9)),
        ),
        max_size=120,
    )
)
@settings(max_examples=60, deadline=None)
def test_the_ring_is_a_queue(steps: list[tuple[str, int]]) -> None:
    """Whatever is sent comes out, in order, unchanged; full means what the format says."""
    ram = Ram(8)
    memory = ram.memory()
    guest, host = ring_pair(memory)
    queue: list[tuple[int, bytes]] = []
    used = 0
    sizes: list[int] = []
    for number, (step, amount) in enumerate(steps):
        if step == "send":
            payload = bytes([number & 0xFF]) * amount
            size = 16 + align8(amount) + 8
            try:
                guest.send(INBAND, payload, transaction_id=number)
            except errors.RingFull:
                assert used + size >= PAGE_SIZE
                assert guest.state.tx_pending == size
            else:
                assert used + size < PAGE_SIZE
                used += size
                sizes.append(size)
                queue.append((number, payload.ljust(align8(amount), b"\0")))
        else:
            packets = host.receive(amount).packets
            assert [(p.transaction_id, p.payload) for p in packets] == queue[:amount]
            used -= sum(sizes[: len(packets)])
            del queue[:amount], sizes[: len(packets)]
        assert guest.state.tx_free == PAGE_SIZE - used
        assert host.state.rx_available == used
    for ring in (guest, host):
        ring.close()
    memory.close()
    ram.close()


# -- signals -------------------------------------------------------------------------------------


def test_only_the_step_from_empty_is_signalled(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    assert guest.send(INBAND)
    assert not guest.send(INBAND)
    host.receive(1)
    assert not guest.send(INBAND)
    host.receive()
    assert guest.send(INBAND)
    assert guest.state.signals_sent == 2
    assert guest.state.signals_suppressed == 2


def test_a_masked_reader_is_not_signalled_and_looks_again(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    host.mask()
    assert word(guest, True, RING_INTERRUPT_MASK) == 1
    assert not guest.send(INBAND)
    assert host.unmask()
    assert word(guest, True, RING_INTERRUPT_MASK) == 0
    host.receive()
    assert not host.unmask()


def test_unpublished_packets_are_seen_and_signalled_together(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    assert not host.send(COMP, transaction_id=1, publish=False)
    assert not host.send(COMP, transaction_id=2, publish=False)
    assert guest.receive().packets == []
    assert host.publish()
    assert not host.publish()
    assert [p.transaction_id for p in guest.receive().packets] == [1, 2]


def test_a_full_ring_shows_what_was_not_published(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    host.send(COMP, bytes(3000), publish=False)
    with pytest.raises(errors.RingFull) as caught:
        host.send(COMP, bytes(3000), publish=False)
    assert caught.value.args == (True,)
    assert len(guest.receive().packets) == 1


def test_space_is_signalled_once_when_it_suffices(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    for _ in range(4):
        guest.send(INBAND, bytes(1000 - 24))  # 4000 of 4096 bytes
    with pytest.raises(errors.RingFull):
        guest.send(INBAND, bytes(2000 - 24))
    assert word(guest, True, RING_PENDING_SEND_SZ) == 2000
    assert not host.receive(1).signal  # 1096 are free: not enough
    assert host.receive(1).signal  # 2096: enough now
    assert not host.receive(1).signal  # it was enough before
    guest.send(INBAND, bytes(2000 - 24))
    assert word(guest, True, RING_PENDING_SEND_SZ) == 0
    assert not host.receive().signal
    assert host.state.space_signals == 1


def test_exactly_the_space_asked_for_is_not_enough(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    guest.send(INBAND, bytes(2048 - 24))
    guest.send(INBAND, bytes(1024 - 24))
    with pytest.raises(errors.RingFull):
        guest.send(INBAND, bytes(3072 - 24))
    assert not host.receive(1).signal  # 3072 free, and a ring is never filled wholly
    with pytest.raises(errors.RingFull):
        guest.send(INBAND, bytes(3072 - 24))
    assert host.receive(1).signal
    guest.send(INBAND, bytes(3072 - 24))


def test_a_peer_without_the_feature_is_not_signalled_for_space(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    set_word(guest, True, RING_FEATURE_BITS, 0)
    assert not host.state.peer_signals_space
    guest.send(INBAND, bytes(4000))
    with pytest.raises(errors.RingFull):
        guest.send(INBAND, bytes(4000))
    assert not host.receive().signal


# -- a peer that lies ----------------------------------------------------------------------------


@pytest.mark.parametrize("index", [1, 4, 12, 4096, 4104, 0xFFFFFFFF])
def test_a_write_index_that_is_none(memory: GuestMemory, index: int) -> None:
    guest, host = ring_pair(memory)
    set_word(guest, True, RING_WRITE_INDEX, index)
    batch = host.receive()
    assert batch.packets == []
    assert isinstance(batch.error, errors.RingIndexInvalid)
    assert (batch.error.field, batch.error.value) == ("write_index", index)
    assert host.unmask()  # it has to be looked at


@pytest.mark.parametrize("index", [1, 4, 4096, 0xFFFFFFF8])
def test_a_read_index_that_is_none(memory: GuestMemory, index: int) -> None:
    guest, host = ring_pair(memory)
    set_word(guest, False, RING_READ_INDEX, index)
    with pytest.raises(errors.RingIndexInvalid) as caught:
        host.send(COMP)
    assert (caught.value.field, caught.value.value) == ("read_index", index)


def test_our_own_indices_are_not_believed_back(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    guest.send(INBAND, b"first")
    set_word(guest, True, RING_READ_INDEX, 2048)
    assert host.receive().packets[0].payload.startswith(b"first")
    assert word(guest, True, RING_READ_INDEX) == 32
    host.send(COMP, transaction_id=1)
    set_word(guest, False, RING_WRITE_INDEX, 2048)
    host.send(COMP, transaction_id=2)
    assert word(guest, False, RING_WRITE_INDEX) == 48


def test_lost_pages_are_named() -> None:
    ram = Ram()
    memory = ram.memory()
    guest, host = ring_pair(memory)
    os.ftruncate(ram.fd, 0)
    assert isinstance(host.receive().error, errors.RingMemoryLost)
    with pytest.raises((errors.RingMemoryLost, errors.RingIndexInvalid)):
        host.send(COMP)
    assert host.lost
    assert host.unmask()
    with pytest.raises(errors.RingInvalid):
        Ring(memory, scattered(4), 2)
    guest.close()
    host.close()
    memory.close()
    ram.close()


def test_limits(memory: GuestMemory) -> None:
    pfns = scattered(16)
    guest = Ring(memory, pfns, 8, Role.GUEST, initialize=True)
    host = Ring(memory, pfns, 8, limits=Limits(64, 8192, 2))
    page = GpaRange.of_pages([BASE_PFN])
    guest.send(INBAND, bytes(64), transaction_id=1)
    guest.send(INBAND, bytes(65), transaction_id=2)
    guest.send_gpa_direct(b"", [page, page], transaction_id=3)
    guest.send_gpa_direct(b"", [page, page, page], transaction_id=4)
    guest.send_gpa_direct(b"", [GpaRange.of_pages([BASE_PFN] * 3)], transaction_id=5)
    packets = host.receive().packets
    assert [type(p.error) for p in packets] == [
        type(None),
        errors.PacketTooLarge,
        type(None),
        errors.GpaRangeCountInvalid,
        errors.GpaRangeTooLong,
    ]
    assert packets[1].error is not None
    assert (packets[1].error.field, packets[1].error.value) == ("payload_length", 72)
    assert packets[1].error.offset == packets[1].ring_offset + 4


# -- threads and waiting -------------------------------------------------------------------------


def test_two_threads_lose_nothing() -> None:
    ram = Ram(8)
    memory = ram.memory()
    guest, host = ring_pair(memory)
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    call = os.eventfd(0, os.EFD_NONBLOCK)
    count = 6000
    problems: list[str] = []

    def run_host() -> None:
        number = 0
        while number < count:
            host.mask()
            batch = host.receive(10)
            if batch.signal:
                signal(call)
            for packet in batch.packets:
                if packet.transaction_id != number:
                    problems.append(f"{packet.transaction_id} instead of {number}")
                number += 1
            if not batch.packets and not host.unmask() and not wait([kick], 10):
                problems.append(f"the host slept through packet {number}")
                return

    thread = threading.Thread(target=run_host)
    thread.start()
    signals = 0
    for number in range(count):
        while True:
            try:
                need = guest.send(INBAND, bytes(number % 200), transaction_id=number)
            except errors.RingFull as full:
                if full.args[0]:
                    signal(kick)
                assert wait([call], 10), f"the guest slept before packet {number}"
                continue
            if need:
                signals += 1
                signal(kick)
            break
    thread.join(20)
    assert not thread.is_alive()
    assert problems == []
    # a busy ring costs fewer signals than packets
    assert signals < count
    for ring in (guest, host):
        ring.close()
    memory.close()
    ram.close()
    os.close(kick)
    os.close(call)


def test_waiting_empties_what_fired() -> None:
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    assert wait(fds, 0) == 0
    signal(fds[0])
    signal(fds[2])
    signal(fds[2])
    assert wait(fds, 1) == 0b101
    assert wait(fds, 0) == 0
    os.eventfd_write(fds[1], (1 << 64) - 2)
    signal(fds[1])  # the counter is at its limit: that is a signal already
    assert wait(fds, 1) == 0b010
    assert is_eventfd(fds[0])
    for fd in fds:
        os.close(fd)
    assert not is_eventfd(fds[0])
    with pytest.raises(OSError, match="Bad file descriptor"):
        signal(fds[0])
    assert not is_eventfd(0)
    with pytest.raises(OSError, match="Invalid argument"):
        wait([0] * 9, 0)
