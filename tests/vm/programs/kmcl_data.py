# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases of ``kmcl_guest.py``: external PFNs and in-band bytes, as they arrive."""

import ctypes
import errno
import json
import mmap
import os
import random

import vmbus_user
from kmcl_support import GUARD, WRITES, ask, digest, fails, obedient, pattern, text, there_and_back
from vmbus_user import HOST_WRITES, PAGE, WAIT_FOR_COMPLETION, Memory


def case_one_page() -> None:
    with obedient() as channel:
        there_and_back(channel, 1)


def case_sixteen_pages() -> None:
    with obedient() as channel:
        there_and_back(channel, 16)


def case_one_mebibyte() -> None:
    with obedient() as channel:
        there_and_back(channel, 256)


def largest(ring_pages: int) -> None:
    """One range with as many PFNs as fit behind an 8-byte descriptor's worth of the rest."""
    request = text("chunks")
    with obedient(ring_pages, 16) as channel:
        limit = channel.info.max_packet
        assert limit == min((ring_pages - 1) * PAGE - 16, 0xFFFF * 8)
        most = (limit - 24 - 8 - (len(request) + 7) // 8 * 8) // 8
        memory = Memory(256 * PAGE)
        memory[:] = data = pattern(1, len(memory))
        numbers = [number % 256 for number in range(most + 1)]
        with fails(errno.EMSGSIZE):
            channel.send(request, [memory.pages(numbers)])
        answer = ask(channel, "chunks", [memory.pages(numbers[:most])])
        assert answer["length"] == most * PAGE
        wholes, rest = divmod(most, 256)
        expected = {digest(data): wholes} if wholes else {}
        if rest:
            expected[digest(data[: rest * PAGE])] = 1
        assert answer["chunks"] == expected, (answer, wholes, rest)


def case_largest_packet_of_the_smallest_ring() -> None:
    largest(2)


def case_largest_packet_of_a_ring() -> None:
    largest(16)


def case_largest_packet_of_all() -> None:
    largest(160)


def case_largest_inline() -> None:
    for ring_pages in (2, 160):
        with obedient(ring_pages, 16) as channel:
            room = channel.info.max_packet - 16
            for size in (room, room - 1, room - 7):
                head = text("raw", size=size - 64).ljust(63) + b"\0"
                raw = pattern(size, size - 64)
                answer = channel.request(head + raw)
                answer = json.loads(answer.rstrip(b"\0"))
                assert answer["sha256"] == digest(raw)
                assert answer["payload"] == (size + 7) // 8 * 8
            with fails(errno.EMSGSIZE):
                channel.send(bytes(room + 1))


def case_scattered_pages() -> None:
    numbers = list(range(512))
    random.Random(1).shuffle(numbers)
    numbers = numbers[:300]
    with obedient() as channel:
        memory = Memory(512 * PAGE)
        memory[:] = before = pattern(2, len(memory))
        gathered = b"".join(before[n * PAGE : (n + 1) * PAGE] for n in numbers)
        answer = ask(channel, "digest", [memory.pages(numbers)])
        assert answer["sha256"] == digest(gathered)
        assert answer["ranges"] == [[300 * PAGE, 0, 300]]
        assert answer["pfns"] == 300
        ask(channel, "fill", [memory.pages(numbers)], writes=True, seed=3)
        new = pattern(3, 300 * PAGE)
        expected = bytearray(before)
        for index, n in enumerate(numbers):
            expected[n * PAGE : (n + 1) * PAGE] = new[index * PAGE : (index + 1) * PAGE]
        assert memory[:] == bytes(expected)


def case_the_same_page_twice() -> None:
    numbers = [0, 1, 0, 2, 0]
    with obedient() as channel:
        memory = Memory(3 * PAGE)
        memory[:] = before = pattern(4, len(memory))
        gathered = b"".join(before[n * PAGE : (n + 1) * PAGE] for n in numbers)
        answer = ask(channel, "digest", [memory.pages(numbers)])
        assert answer["sha256"] == digest(gathered)
        assert (answer["length"], answer["pfns"]) == (5 * PAGE, 3)
        # Written in order, so each page has what was meant for its last appearance.
        ask(channel, "fill", [memory.pages(numbers)], writes=True, seed=5)
        new = pattern(5, 5 * PAGE)
        assert memory[:] == new[4 * PAGE :] + new[PAGE : 2 * PAGE] + new[3 * PAGE : 4 * PAGE]
        assert channel.info.pinned_pages == 0


def case_byte_offsets() -> None:
    with obedient() as channel:
        memory = Memory(8 * PAGE)
        for offset in (1, 7, 8, 2048, 4095):
            for size in (1, 8, PAGE - offset, PAGE, PAGE + 1, 3 * PAGE - 1):
                memory[:] = bytes([GUARD]) * len(memory)
                data = pattern(offset + size, size)
                memory[PAGE + offset : PAGE + offset + size] = data
                pages = (offset + size + PAGE - 1) // PAGE
                numbers = list(range(1, 1 + pages))
                for piece in (
                    memory.range(PAGE + offset, size),
                    memory.pages(numbers, offset, size),
                ):
                    answer = ask(channel, "digest", [piece])
                    assert answer["sha256"] == digest(data), (offset, size)
                    assert answer["ranges"] == [[size, offset, pages]]
                ask(channel, "fill", [memory.range(PAGE + offset, size)], writes=True, seed=size)
                expected = bytearray([GUARD]) * len(memory)
                expected[PAGE + offset : PAGE + offset + size] = pattern(size, size)
                assert memory[:] == bytes(expected), (offset, size)


def case_several_ranges() -> None:
    with obedient() as channel:
        memory = Memory(64 * PAGE)
        memory[:] = data = pattern(6, len(memory))
        pieces = [(0, PAGE), (5 * PAGE + 17, 3 * PAGE), (20 * PAGE + 4095, 2), (33 * PAGE, 1)]
        ranges = [memory.range(*piece) for piece in pieces]
        ranges.insert(2, memory.pages([60, 40, 60], 100, 3 * PAGE - 200))
        listed = b"".join(data[n * PAGE : (n + 1) * PAGE] for n in (60, 40, 60))[100:-100]
        parts = [data[start : start + size] for start, size in pieces]
        parts.insert(2, listed)
        answer = ask(channel, "digest", ranges)
        assert answer["sha256"] == digest(b"".join(parts))
        assert len(answer["ranges"]) == 5
        many = [memory.range(index * 100, 50) for index in range(2000)]
        answer = ask(channel, "digest", many)
        expected = b"".join(data[index * 100 : index * 100 + 50] for index in range(2000))
        assert answer["sha256"] == digest(expected)


def case_completions_carry_the_transaction_id() -> None:
    with obedient() as channel:
        memory = Memory(PAGE)
        sent = {}
        for key in range(100):
            sent[key] = channel.send(text("hold", key=key), [memory.range()])
        assert len(set(sent.values())) == 100
        info = channel.info
        assert (info.in_flight, info.pinned_pages) == (100, 100)
        order = random.Random(2).sample(range(100), 100)
        ask(channel, "release", keys=order)
        for key in order[:30]:  # whichever comes first, in the order of completion
            number, payload, _ = channel.wait(timeout=10)
            answer = json.loads(payload.rstrip(b"\0"))
            assert number == sent[key] == answer["id"]
            assert answer["key"] == key
        for key in sorted(order[30:]):  # each by its id
            number, payload, _ = channel.wait(sent[key], 10)
            assert json.loads(payload.rstrip(b"\0")) == {"key": key, "id": sent[key]}
            with fails(errno.ENOENT):
                channel.wait(sent[key], 0)
        info = channel.info
        assert (info.in_flight, info.completed, info.pinned_pages) == (0, 0, 0)


def case_an_inline_buffer_changed_after_the_call() -> None:
    """The very buffer that the kernel was given, and at once."""
    with obedient(160) as channel:
        head = text("raw", size=448).ljust(63) + b"\0"
        buffer = (ctypes.c_uint8 * 512)()
        ids = []
        for index in range(200):
            buffer[:] = head + pattern(index, 448)
            request = vmbus_user._Send(
                ctypes.addressof(buffer), 512, WAIT_FOR_COMPLETION, 0, 0, 4096, -1, 0, 0
            )
            channel._request(vmbus_user.IOC_SEND, request)
            ctypes.memset(buffer, GUARD, 512)
            ids.append(request.transaction_id)
        for index, number in enumerate(ids):
            answer = json.loads(channel.wait(number, 20).payload.rstrip(b"\0"))
            assert answer["sha256"] == digest(pattern(index, 448)), index


def case_external_pfns_need_the_completion_flag() -> None:
    with obedient() as channel:
        memory = Memory(PAGE)
        for flags in (0, HOST_WRITES):
            with fails(errno.EINVAL):
                channel.send(text("digest"), [memory.range()], flags=flags)
        assert channel.info.sent == 0
        there_and_back(channel, 1)


def case_an_inline_packet_without_completion() -> None:
    with obedient() as channel:
        assert channel.send(text("counts"), flags=0) == 0
        there_and_back(channel, 1)
        info = channel.info
        assert (info.in_flight, info.completed, info.stray_completions) == (0, 0, 0)


def case_what_is_refused() -> None:
    with obedient() as channel:
        memory = Memory(4 * PAGE)
        start = memory.address
        hole = Memory(3 * PAGE)
        gone = hole.address
        hole_end = gone + 3 * PAGE
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.munmap(ctypes.c_void_p(gone + PAGE), ctypes.c_size_t(PAGE)) == 0
        wrong = {
            "empty": (vmbus_user.Range(start, 0, 0, 0, 0), errno.EINVAL),
            "reserved": (vmbus_user.Range(start, 8, 0, 0, 1), errno.EINVAL),
            "offset": (vmbus_user.Range(start, 8, 8, 0, 0), errno.EINVAL),
            "too few pages": (memory.pages([0, 1], 0, 2 * PAGE + 1), errno.EINVAL),
            "too many pages": (memory.pages([0, 1], 0, PAGE), errno.EINVAL),
            "far offset": (memory.pages([0, 1], PAGE, PAGE), errno.EINVAL),
            "null": (vmbus_user.Range(0, PAGE, 0, 0, 0), errno.EFAULT),
            "hole": (vmbus_user.Range(gone, 3 * PAGE, 0, 0, 0), errno.EFAULT),
            "end": (vmbus_user.Range(hole_end - 8, 1 << 20, 0, 0, 0), errno.EFAULT),
            "kernel": (vmbus_user.Range((1 << 64) - (1 << 20), PAGE, 0, 0, 0), errno.EFAULT),
            "wraps": (vmbus_user.Range((1 << 64) - PAGE, 2 * PAGE, 0, 0, 0), errno.EINVAL),
            "list": (vmbus_user.Range(16, PAGE, 0, 1, 0), errno.EFAULT),
        }
        unaligned = memory.pages([0])
        unaligned.listed[0] += 8
        wrong["unaligned"] = (unaligned, errno.EINVAL)
        for name, (piece, number) in wrong.items():
            try:
                with fails(number):
                    channel.send(text("digest"), [memory.range(), piece])
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
        with fails(errno.EINVAL):
            channel.send(b"", flags=1 << 7)
        with fails(errno.ENOENT):
            channel.wait(12345, 0)
        with fails(errno.ENOENT):
            channel.wait(1 << 40, 0)
        with fails(errno.ENOTTY):
            vmbus_user.fcntl.ioctl(channel, vmbus_user._ioc(0, 0xEF, 0))
        info = channel.info
        assert (info.sent, info.in_flight, info.pinned_pages) == (0, 0, 0)
        # Memory that cannot be written can be sent, but not be written to.
        with open("/proc/self/exe", "rb") as program:
            mapped = mmap.mmap(program.fileno(), 4 * PAGE, prot=mmap.PROT_READ)
        expected = digest(mapped[:])
        assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(4 * PAGE), 1) == 0
        piece = vmbus_user.Range(start, 4 * PAGE, 0, 0, 0)
        assert ask(channel, "digest", [piece])["sha256"] == digest(bytes(4 * PAGE))
        with fails(errno.EFAULT):
            channel.send(text("fill", seed=1), [piece], flags=WRITES)
        address = find_mapping(os.path.realpath("/proc/self/exe"), 4 * PAGE)
        piece = vmbus_user.Range(address, 4 * PAGE, 0, 0, 0)
        assert ask(channel, "digest", [piece])["sha256"] == expected
        there_and_back(channel, 2)


def find_mapping(path: str, size: int) -> int:
    """Where this process has the beginning of a file mapped, to be read only."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            words = line.split()
            start, end = (int(word, 16) for word in words[0].split("-"))
            at_start = words[1].startswith("r--") and int(words[2], 16) == 0
            if words[-1] == path and at_start and end - start >= size:
                return start
    raise AssertionError(f"{path} is not mapped")
