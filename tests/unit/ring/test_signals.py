# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals of a ring, and two threads that wait for each other."""

import os
import threading

import pytest

from tests.support.ram import Ram
from tests.support.rings import ring_pair, set_word, word
from vhostvmbus.memory import GuestMemory
from vhostvmbus.ring import Sent, signal, wait
from vhostvmbus.wire.vmbus import (
    RING_FEATURE_BITS,
    RING_INTERRUPT_MASK,
    RING_PENDING_SEND_SZ,
    PacketType,
)

INBAND, COMP = PacketType.DATA_INBAND, PacketType.COMP


# -- signals -------------------------------------------------------------------------------------


def test_only_the_step_from_empty_is_signalled(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    assert guest.send(INBAND).signal
    assert not guest.send(INBAND).signal
    host.receive(1)
    assert not guest.send(INBAND).signal
    host.receive()
    assert guest.send(INBAND).signal
    assert guest.state.signals_sent == 2
    assert guest.state.signals_suppressed == 2


def test_a_masked_reader_is_not_signalled_and_looks_again(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    host.mask()
    assert word(guest, True, RING_INTERRUPT_MASK) == 1
    assert not guest.send(INBAND).signal
    assert host.unmask()
    assert word(guest, True, RING_INTERRUPT_MASK) == 0
    host.receive()
    assert not host.unmask()


def test_unpublished_packets_are_seen_and_signalled_together(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    assert not host.send(COMP, transaction_id=1, publish=False).signal
    assert not host.send(COMP, transaction_id=2, publish=False).signal
    assert guest.receive().packets == []
    assert host.publish()
    assert not host.publish()
    assert [p.transaction_id for p in guest.receive().packets] == [1, 2]


def test_a_full_ring_shows_what_was_not_published(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    host.send(COMP, bytes(3000), publish=False).check()
    assert host.send(COMP, bytes(3000), publish=False) == Sent(0, True, full=True)
    assert len(guest.receive().packets) == 1


def test_space_is_signalled_once_when_it_suffices(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    for _ in range(4):
        guest.send(INBAND, bytes(1000 - 24))  # 4000 of 4096 bytes
    assert guest.send(INBAND, bytes(2000 - 24)) == Sent(0, False, full=True)
    assert word(guest, True, RING_PENDING_SEND_SZ) == 2000
    assert not host.receive(1).signal  # 1096 are free: not enough
    assert host.receive(1).signal  # 2096: enough now
    assert not host.receive(1).signal  # it was enough before
    guest.send(INBAND, bytes(2000 - 24)).check()
    assert word(guest, True, RING_PENDING_SEND_SZ) == 0
    assert not host.receive().signal
    assert host.state.space_signals == 1


def test_exactly_the_space_asked_for_is_not_enough(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    guest.send(INBAND, bytes(2048 - 24)).check()
    guest.send(INBAND, bytes(1024 - 24)).check()
    assert guest.send(INBAND, bytes(3072 - 24)) == Sent(0, False, full=True)
    assert not host.receive(1).signal  # 3072 free, and a ring is never filled wholly
    assert guest.send(INBAND, bytes(3072 - 24)) == Sent(0, False, full=True)
    assert host.receive(1).signal
    guest.send(INBAND, bytes(3072 - 24)).check()


def test_a_peer_without_the_feature_is_not_signalled_for_space(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    set_word(guest, True, RING_FEATURE_BITS, 0)
    assert not host.state.peer_signals_space
    guest.send(INBAND, bytes(4000)).check()
    assert guest.send(INBAND, bytes(4000)) == Sent(0, False, full=True)
    assert not host.receive().signal


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
            sent = guest.send(INBAND, bytes(number % 200), transaction_id=number)
            if sent.signal:
                signals += 1
                signal(kick)
            if not sent.full:
                sent.check()
                break
            assert wait([call], 10), f"the guest slept before packet {number}"
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
    for fd in fds:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        signal(fds[0])
    with pytest.raises(OSError, match="Invalid argument"):
        wait([0] * 9, 0)
