# SPDX-License-Identifier: GPL-2.0-or-later
"""The ring engine, both roles on the same pages: attaching, order, wrap-around."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ram import BASE, BASE_PFN, PAGES, Ram, scattered
from tests.support.rings import ring_pair, set_word, word
from tests.support.soak import examples
from vhostvmbus.memory import GuestMemory
from vhostvmbus.ring import Ring, Role
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.vmbus import (
    PAGE_SIZE,
    RING_FEATURE_BITS,
    RING_READ_INDEX,
    RING_WRITE_INDEX,
    PacketType,
    align8,
)

INBAND, COMP = PacketType.DATA_INBAND, PacketType.COMP


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


def test_rings_in_many_pieces_are_bounded(memory: GuestMemory) -> None:
    """Each piece is a mapping, of which the process has only so many."""
    scattered_pages = [BASE_PFN + i for i in range(0, 64, 2)]
    memory.mappings.limit = 2 * len(scattered_pages) + 20
    ring = Ring(memory, scattered_pages, 16)
    for _ in range(2):
        with pytest.raises(errors.MappingLimit) as caught:
            Ring(memory, scattered_pages, 16)
        assert caught.value.status is NtStatus.INSUFFICIENT_RESOURCES
    Ring(memory, range(BASE_PFN + 64, BASE_PFN + 96), 16).close()  # in one piece
    ring.close()
    Ring(memory, scattered_pages, 16).close()


def test_what_the_host_lacks_is_not_the_guests_mistake(memory: GuestMemory) -> None:
    """A ring that the process has no address space for is refused for want of resources."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_SIZE
    pages = [BASE_PFN] * (1 << 18)  # 2 GiB with what is mapped twice
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
    memory.mappings.limit = 1 << 30
    try:
        with pytest.raises(errors.RingInvalid) as caught:
            Ring(memory, pages, 1 << 17)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert caught.value.status is NtStatus.INSUFFICIENT_RESOURCES


RUNS_OUT = """
import resource
from pathlib import Path
from tests.support.ram import BASE_PFN, Ram
from tests.support.rings import ring_pair
from vhostvmbus.wire.gpa import GpaRange

memory = Ram().memory()
guest, host = ring_pair(memory, 140, 2)
pieces = [BASE_PFN + 200 + 2 * (i % 100) for i in range(60_000)]
guest.send_gpa_direct(b"", [GpaRange.of_pages(pieces)]).check()
guest.send_gpa_direct(b"", [GpaRange.of_pages([BASE_PFN + 200])]).check()
used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 10), before[1]))
try:
    host.receive()
    outcome = "enough"
except MemoryError:
    outcome = "too little"
resource.setrlimit(resource.RLIMIT_AS, before)
print(outcome, memory.regions[0].users)
"""


def test_memory_that_runs_out_leaves_no_page_in_use() -> None:
    """For a packet of very many pieces, and one behind it in the same batch."""
    done = subprocess.run(
        [sys.executable, "-c", RUNS_OUT], capture_output=True, text=True, check=True
    )
    assert done.stdout == "too little 0\n"


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
        guest.send(INBAND, b"x" * 40, transaction_id=transaction).check()
    assert [p.transaction_id for p in host.receive(2).packets] == [0, 1]
    host.send(COMP, transaction_id=0).check()
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
    guest.send(INBAND, b"question", transaction_id=1 << 63, flags=1).check()
    (packet,) = host.receive().packets
    assert (packet.type, packet.flags, packet.transaction_id) == (INBAND, 1, 1 << 63)
    assert (packet.payload, packet.completion_requested) == (b"question", True)
    assert packet.external_data is None
    host.send(COMP, bytearray(b"answer"), transaction_id=1 << 63).check()
    (packet,) = guest.receive().packets
    assert (packet.type, packet.payload) == (COMP, b"answer\0\0")


def test_payloads_are_copied_when_they_are_sent(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    buffer = bytearray(b"original")
    guest.send(INBAND, buffer).check()
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
        guest.send_gpa_direct(payload, [GpaRange(5000, 8, [BASE_PFN + 9, BASE_PFN + 20])]).check()
        (packet,) = host.receive().packets
        assert packet.payload == payload
        assert packet.ring_offset == start
        assert packet.external_data is not None
        assert packet.external_data.segments == [
            (BASE + 9 * 4096 + 8, 4088),
            (BASE + 20 * 4096, 912),
        ]
        host.send(COMP, payload, transaction_id=start).check()
        (packet,) = guest.receive().packets
        assert (packet.payload, packet.transaction_id) == (payload, start)
        guest.close()
        host.close()


def test_trailers_say_where_the_packet_started(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    guest.send(INBAND, b"x" * 8).check()
    guest.send(INBAND, b"y" * 8).check()
    data = bytes(guest.pages(True)[PAGE_SIZE:])
    assert data[24:32] == bytes(8)
    assert data[56:64] == (32 << 32).to_bytes(8, "little")
    assert len(host.receive().packets) == 2


def test_gpa_direct_ranges_arrive(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    ranges = [GpaRange(100, 4000, [BASE_PFN + 1, BASE_PFN + 2]), GpaRange.of_pages([BASE_PFN + 7])]
    guest.send_gpa_direct(b"command!", ranges, transaction_id=5).check()
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
    guest.send(PacketType.DATA_USING_GPA_DIRECT, b"srb", header=header + bytes(31 * 8)).check()
    (packet,) = host.receive().packets
    assert packet.error is None
    assert packet.payload == b"srb".ljust(8, b"\0")
    assert packet.external_data is not None
    assert packet.external_data.segments == [(BASE, 512)]


def test_the_batch_is_bounded(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    for i in range(20):
        guest.send(INBAND, transaction_id=i).check()
    assert len(host.receive(7).packets) == 7
    assert len(host.receive(0).packets) == 0
    assert [p.transaction_id for p in host.receive(64).packets] == list(range(7, 20))
    assert host.receive().packets == []


def test_packets_that_can_never_fit(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    guest.send(INBAND, bytes(4096 - 16 - 8 - 8)).check()
    assert len(host.receive().packets[0].payload) == 4064
    sent = guest.send(INBAND, bytes(4096 - 16 - 8 - 7))
    assert sent[:3] == (0, False, False)
    assert isinstance(sent.error, errors.PacketTooBig)
    big = Ring(memory, scattered(400), 200, Role.GUEST, initialize=True)
    big.send(INBAND, bytes(0xFFFF * 8 - 16)).check()
    with pytest.raises(errors.PacketTooBig):
        big.send(INBAND, bytes(0xFFFF * 8 - 15)).check().check()


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("send"), st.integers(0, 700)),
            st.tuples(st.just("receive"), st.integers(1, 9)),
        ),
        max_size=120,
    )
)
@settings(max_examples=examples(60), deadline=None)
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
            sent = guest.send(INBAND, payload, transaction_id=number)
            assert sent.error is None
            if sent.full:
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
