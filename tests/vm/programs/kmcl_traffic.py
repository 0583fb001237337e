# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases of ``kmcl_guest.py``: waiting, host-initiated packets, GPADLs, full rings."""

import errno
import json
import select
import threading
import time

import vmbus_user
from kmcl_support import ask, digest, fails, obedient, pattern, text, there_and_back
from vmbus_user import PAGE, Channel, Memory


def case_wait_times_out() -> None:
    with obedient() as channel:
        memory = Memory(PAGE)
        number = channel.send(text("hold", key=1), [memory.range()])
        poller = select.poll()
        poller.register(channel, select.POLLPRI)
        for which in (number, 0):
            start = time.monotonic()
            with fails(errno.ETIMEDOUT):
                channel.wait(which, 0.2)
            assert 0.19 < time.monotonic() - start < 5
        with fails(errno.ETIMEDOUT):
            channel.receive(0.05)
        assert poller.poll(50) == []
        assert channel.info.pinned_pages == 1  # a packet that was not waited for is in flight
        release = channel.send(text("release", keys=[1]))
        channel.wait(release, 10)
        assert poller.poll(5000) == [(channel.fileno(), select.POLLPRI)]
        assert json.loads(channel.wait(number, 10).payload.rstrip(b"\0"))["key"] == 1
        assert poller.poll(0) == []


QUEUED = 1024
"""Packets of the host that the module keeps for a program that does not take them."""


def case_the_host_pushes() -> None:
    """More than the module queues: the rest waits in the ring, and the host is told."""
    count, size = 3000, 200
    with obedient() as channel:
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        assert poller.poll(0) == []
        ask(channel, "push", count=count, size=size)
        assert poller.poll(60000)
        deadline = time.monotonic() + 60
        while channel.info.received < QUEUED:
            assert time.monotonic() < deadline, channel.info.received
            time.sleep(0.02)
        time.sleep(0.2)  # for what must not come
        assert channel.info.received == QUEUED
        replies = []
        for index in range(count):
            packet = channel.receive(20)
            assert packet.payload == pattern(index, size), index
            assert (packet.type, packet.header, packet.to_complete) == (6, b"", True)
            reply = pattern(index + 1, 8 + index % 3 * 8)
            channel.complete(packet.transaction_id, reply)
            with fails(errno.ENOENT):
                channel.complete(packet.transaction_id)
            replies.append(digest(reply))
        answer = ask(channel, "pushed")
        assert answer["done"]
        assert answer["sha256"] == digest("".join(replies).encode())
        info = channel.info
        assert (info.packets, info.dropped, info.to_complete) == (count, 0, 0)


def case_receive_into_too_little() -> None:
    with obedient() as channel:
        ask(channel, "push", count=1, size=80)
        with fails(errno.EMSGSIZE):
            channel.receive(10, capacity=72)
        packet = channel.receive(0, capacity=80)
        assert packet.payload == pattern(0, 80)
        channel.complete(packet.transaction_id, b"12345678")
        assert ask(channel, "pushed")["done"]


def case_replies_of_any_size() -> None:
    with obedient(16, 64) as channel:
        for size in (0, 1, 8, 4096, 60000, 200000):
            number = channel.send(text("reply", size=size), reply_capacity=65536)
            answer = channel.wait(number, 10, capacity=300000)
            expected = pattern(size, size).ljust((size + 7) // 8 * 8, b"\0")
            assert (answer.payload, answer.length) == (expected[:65536], len(expected)), size
        number = channel.send(text("reply", size=800))
        assert channel.wait(number, 10, capacity=24).payload == pattern(800, 24)
        # A ring of two pages back: the largest completion is what it can carry.
    with obedient(16, 2) as channel:
        size = PAGE - 32
        number = channel.send(text("reply", size=size))
        assert channel.wait(number, 10).payload == pattern(size, size)


def gpadl_round(channel: Channel, memory: Memory, gpadl: vmbus_user.Gpadl) -> None:
    data = pattern(len(memory), len(memory))
    memory[:] = data
    answer = ask(channel, "gpadl", handle=gpadl.handle)
    assert answer["sha256"] == digest(data)
    assert memory[:] == data[::-1]


def case_gpadls_of_user_memory() -> None:
    with obedient() as channel:
        for pages in (1, 26, 27, 500):
            memory = Memory(pages * PAGE)
            gpadl = channel.create_gpadl(memory)
            assert channel.info.pinned_pages == pages
            gpadl_round(channel, memory, gpadl)
            channel.delete_gpadl(gpadl)
            with fails(errno.ENOENT):
                channel.delete_gpadl(gpadl)
        info = channel.info
        assert (info.pinned_pages, info.gpadls) == (0, 0)
        with fails(errno.EMSGSIZE):
            channel.create_gpadl(8191 * PAGE)
        with fails(errno.EINVAL):
            channel.create_gpadl(PAGE + 8)
        with fails(errno.EINVAL):
            channel.create_gpadl(0)


def case_gpadls_of_kernel_memory() -> None:
    with obedient() as channel:
        for pages in (1, 30, 8190):
            gpadl = channel.create_gpadl(pages * PAGE)
            memory = channel.map_gpadl(gpadl)
            assert memory[:PAGE] == bytes(PAGE)
            gpadl_round(channel, memory, gpadl)
            with fails(errno.EINVAL):
                Memory(2 * PAGE, channel.fileno(), gpadl.mmap_offset + (pages - 1) * PAGE)
            channel.delete_gpadl(gpadl)
            with fails(errno.ENXIO):
                channel.map_gpadl(gpadl)
            assert memory[-1] == pattern(pages * PAGE, 1)[0]  # the mapping outlives the GPADL
        assert channel.info.pinned_pages == 0


def case_gpadls_go_with_the_channel() -> None:
    channel = obedient()
    memory = Memory(40 * PAGE)
    for _ in range(8):
        channel.create_gpadl(memory)
    gpadl = channel.create_gpadl(memory)
    ask(channel, "map", handle=gpadl.handle)  # the host has it mapped still
    assert channel.info.gpadls == 9
    channel.close()
    channel.open()
    assert channel.info.gpadls == 0
    there_and_back(channel, 3)
    channel.release()


def case_many_senders_and_a_full_ring() -> None:
    """Nothing is lost and nobody gets another's completion, in a ring with room for few."""
    with obedient(2, 2) as channel:
        problems: list[str] = []

        def send(which: int) -> None:
            memory = Memory(PAGE)
            memory[:] = data = pattern(which, PAGE)
            try:
                for index in range(60):
                    size = which * 37 + index
                    head = text("raw", size=size).ljust(63) + b"\0"
                    raw = pattern(size, size)
                    answer = channel.request(head + raw)
                    assert json.loads(answer.rstrip(b"\0"))["sha256"] == digest(raw)
                    if index % 10 == 0:
                        answer = ask(channel, "digest", [memory.range()])
                        assert answer["sha256"] == digest(data)
            except BaseException as error:
                problems.append(f"{which}: {error!r}")

        threads = [threading.Thread(target=send, args=(which,)) for which in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert problems == []
        info = channel.info
        assert info.sent == info.completions == 8 * 66
        assert (info.stray_completions, info.in_flight, info.completed) == (0, 0, 0)


def case_a_full_ring_makes_senders_wait() -> None:
    """Requests of nearly the whole ring: the second waits for the first to be taken."""
    with obedient(2, 16) as channel:
        nap = channel.send(text("nap", seconds=2))
        ids = []
        for index in range(40):
            head = text("raw", size=2900).ljust(63) + b"\0"
            ids.append(channel.send(head + pattern(index, 2900), timeout=10))
        for index, number in enumerate(ids):
            answer = json.loads(channel.wait(number, 10).payload.rstrip(b"\0"))
            assert answer["sha256"] == digest(pattern(index, 2900))
        channel.wait(nap, 10)
        assert channel.info.ring_full > 0


def case_a_thousand_in_flight() -> None:
    with obedient(64, 64) as channel:
        memory = Memory(16 * PAGE)
        ids = [channel.send(text("hold", key=key), [memory.range()]) for key in range(1000)]
        info = channel.info
        assert (info.in_flight, info.pinned_pages) == (1000, 16000)
        ask(channel, "release", keys=list(range(999, 499, -1)))
        ask(channel, "release", keys=list(range(500)))
        for number in ids:
            channel.wait(number, 10)
        info = channel.info
        assert (info.in_flight, info.completed, info.pinned_pages) == (0, 0, 0)
