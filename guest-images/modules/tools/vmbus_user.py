# SPDX-License-Identifier: GPL-2.0-or-later
"""VMBus channels from Python, in a guest that has the kernel module vmbus_user.

    with Channel.of_class("2d5bc5a2-4a86-4d0a-8b6f-3a0c9f1f6e57") as channel:
        pages = Memory(16 * 4096)
        pages[:5] = b"bytes"
        print(channel.request(b"", [pages.range()]).hex())

Follows ``vmbus_user.h`` one to one; what a request means and which errors it ends with is said
there. Errors are OSError with the request's errno. Time-outs are in seconds, ``None`` waits for
ever. Needs nothing but the standard library.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

PAGE = 4096
DRIVER = Path("/sys/bus/vmbus/drivers/vmbus_user")
DEVICES = Path("/sys/bus/vmbus/devices")
NODES = Path("/dev/vmbus")

CLOSED, OPEN, GONE = range(3)
WAIT_FOR_COMPLETION = 1
HOST_WRITES = 2
TO_COMPLETE = 1


class Info(ctypes.Structure):
    _fields_ = [
        ("abi", c_uint32), ("state", c_uint32), ("class_id", c_uint8 * 16),
        ("instance_id", c_uint8 * 16), ("vmbus_version", c_uint32), ("channel_flags", c_uint16),
        ("mmio_megabytes", c_uint16), ("user_defined", c_uint8 * 120), ("send_ring", c_uint32),
        ("receive_ring", c_uint32), ("max_packet", c_uint32), ("in_flight", c_uint32),
        ("completed", c_uint32), ("received", c_uint32), ("to_complete", c_uint32),
        ("gpadls", c_uint32), ("pinned_pages", c_uint64), ("sent", c_uint64),
        ("ring_full", c_uint64), ("completions", c_uint64), ("stray_completions", c_uint64),
        ("packets", c_uint64), ("dropped", c_uint64),
    ]  # fmt: skip


class _Open(ctypes.Structure):
    _fields_ = [
        ("send_pages", c_uint32), ("receive_pages", c_uint32), ("max_packet", c_uint32),
        ("user_data_length", c_uint32), ("user_data", c_uint8 * 120),
    ]  # fmt: skip


class Range(ctypes.Structure):
    """struct vmbus_user_range; made by :meth:`Memory.range` and :meth:`Memory.pages`."""

    _fields_ = [
        ("addr", c_uint64), ("byte_count", c_uint32), ("byte_offset", c_uint32),
        ("page_count", c_uint32), ("reserved", c_uint32),
    ]  # fmt: skip


class _Send(ctypes.Structure):
    _fields_ = [
        ("buffer", c_uint64), ("buffer_length", c_uint32), ("flags", c_uint32),
        ("ranges", c_uint64), ("range_count", c_uint32), ("reply_capacity", c_uint32),
        ("timeout", c_int32), ("reserved", c_uint32), ("transaction_id", c_uint64),
    ]  # fmt: skip


class _Wait(ctypes.Structure):
    _fields_ = [
        ("transaction_id", c_uint64), ("reply", c_uint64), ("capacity", c_uint32),
        ("reply_length", c_uint32), ("timeout", c_int32), ("copied", c_uint32),
    ]  # fmt: skip


class _Receive(ctypes.Structure):
    _fields_ = [
        ("buffer", c_uint64), ("capacity", c_uint32), ("length", c_uint32),
        ("header_length", c_uint32), ("type", c_uint16), ("flags", c_uint16),
        ("transaction_id", c_uint64), ("timeout", c_int32), ("reserved", c_uint32),
    ]  # fmt: skip


class _Complete(ctypes.Structure):
    _fields_ = [
        ("transaction_id", c_uint64), ("buffer", c_uint64), ("buffer_length", c_uint32),
        ("timeout", c_int32),
    ]  # fmt: skip


class _Gpadl(ctypes.Structure):
    _fields_ = [
        ("addr", c_uint64), ("length", c_uint64), ("handle", c_uint32), ("reserved", c_uint32),
        ("mmap_offset", c_uint64),
    ]  # fmt: skip


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | ord("V") << 8 | number


IOC_INFO = _ioc(2, 0xE0, ctypes.sizeof(Info))
IOC_OPEN = _ioc(1, 0xE1, ctypes.sizeof(_Open))
IOC_CLOSE = _ioc(0, 0xE2, 0)
IOC_SEND = _ioc(3, 0xE3, ctypes.sizeof(_Send))
IOC_WAIT = _ioc(3, 0xE4, ctypes.sizeof(_Wait))
IOC_RECEIVE = _ioc(3, 0xE5, ctypes.sizeof(_Receive))
IOC_COMPLETE = _ioc(1, 0xE6, ctypes.sizeof(_Complete))
IOC_GPADL_CREATE = _ioc(3, 0xE7, ctypes.sizeof(_Gpadl))
IOC_GPADL_DELETE = _ioc(1, 0xE8, 4)


def _milliseconds(timeout: float | None) -> int:
    return -1 if timeout is None else min(round(timeout * 1000), 0x7FFFFFFF)


def _address(buffer: object) -> int:
    return ctypes.addressof(c_uint8.from_buffer(buffer))  # type: ignore[arg-type]


class Memory(mmap.mmap):
    """Page-aligned memory of the process's own, zeroed; or what a GPADL of the kernel's shows."""

    def __new__(cls, size: int, fd: int = -1, offset: int = 0) -> "Memory":
        return super().__new__(cls, fd, size, offset=offset)

    @property
    def address(self) -> int:
        """Where it starts. Valid until it is closed."""
        return _address(self)

    def range(self, offset: int = 0, length: int | None = None) -> Range:
        """``length`` bytes from ``offset`` on; all that follow by default."""
        size = len(self) - offset if length is None else length
        return Range(self.address + offset, size, 0, 0, 0)

    def pages(
        self, numbers: Sequence[int], byte_offset: int = 0, byte_count: int | None = None
    ) -> Range:
        """The pages of these numbers, in this order; numbers may come again.

        The data is ``byte_count`` bytes, by default up to the end of the last page, from
        ``byte_offset`` in the first page on.
        """
        start = self.address
        listed = (c_uint64 * len(numbers))(*(start + PAGE * number for number in numbers))
        count = len(numbers) * PAGE - byte_offset if byte_count is None else byte_count
        made = Range(ctypes.addressof(listed), count, byte_offset, len(numbers), 0)
        made.listed = listed  # kept as long as the range
        return made


class Completion(NamedTuple):
    """What the host answered."""

    transaction_id: int
    payload: bytes
    length: int
    """Of the payload as it was sent; more than ``len(payload)`` if that was cut off."""


class Received(NamedTuple):
    """A packet of the host's."""

    transaction_id: int
    payload: bytes
    header: bytes
    """What its descriptor holds besides the usual, such as transfer page ranges."""
    type: int
    to_complete: bool


class Gpadl(NamedTuple):
    """A GPADL; ``mmap_offset`` is for those that the kernel allocated."""

    handle: int
    length: int
    mmap_offset: int


class Channel:
    """A device's node, and after :meth:`open` the channel."""

    def __init__(self, node: str | os.PathLike[str]) -> None:
        self._fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)

    @classmethod
    def of_class(cls, class_id: str | UUID, *, send_pages: int = 16, receive_pages: int = 16,
                 patience: float = 10.0) -> "Channel":  # fmt: skip
        """Bind the driver to a class, wait for its first device, open the channel."""
        bind(class_id)
        channel = cls(find_node(class_id, patience))
        channel.open(send_pages, receive_pages)
        return channel

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *unused: object) -> None:
        self.release()

    def fileno(self) -> int:
        """For select and poll: POLLIN, a packet; POLLPRI, a completion; POLLHUP, gone."""
        return self._fd

    def release(self) -> None:
        """Close the file, and with it the channel."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _request(self, number: int, argument: ctypes.Structure) -> None:
        fcntl.ioctl(self._fd, number, argument)  # type: ignore[call-overload]

    @property
    def info(self) -> Info:
        """State, offer, counters."""
        info = Info()
        self._request(IOC_INFO, info)
        return info

    def open(self, send_pages: int = 16, receive_pages: int = 16, user_data: bytes = b"",
             max_packet: int = 0) -> None:  # fmt: skip
        """Open the channel; ring sizes in pages, each with its page of header."""
        request = _Open(send_pages, receive_pages, max_packet, len(user_data))
        ctypes.memmove(request.user_data, user_data, min(len(user_data), 120))
        self._request(IOC_OPEN, request)

    def close(self) -> None:
        """Close the channel, not the file."""
        fcntl.ioctl(self._fd, IOC_CLOSE)

    def send(
        self,
        payload: bytes | bytearray | memoryview = b"",
        ranges: Iterable[Range] = (),
        *,
        flags: int = WAIT_FOR_COMPLETION,
        reply_capacity: int = 4096,
        timeout: float | None = None,
    ) -> int:
        """Send a packet; its transaction id, 0 if nobody waits for it."""
        buffer = (c_uint8 * max(len(payload), 1)).from_buffer_copy(bytes(payload) or b"\0")
        listed = list(ranges)
        array = (Range * max(len(listed), 1))(*listed)
        request = _Send(
            ctypes.addressof(buffer), len(payload), flags, ctypes.addressof(array), len(listed),
            reply_capacity, _milliseconds(timeout), 0, 0,
        )  # fmt: skip
        self._request(IOC_SEND, request)
        return int(request.transaction_id)

    def wait(
        self, transaction_id: int = 0, timeout: float | None = None, capacity: int = 4096
    ) -> Completion:
        """Wait for a packet's completion, by default for whichever comes first."""
        buffer = (c_uint8 * max(capacity, 1))()
        request = _Wait(
            transaction_id, ctypes.addressof(buffer), capacity, 0, _milliseconds(timeout), 0
        )
        self._request(IOC_WAIT, request)
        payload = bytes(buffer[: request.copied])
        return Completion(request.transaction_id, payload, request.reply_length)

    def request(
        self,
        payload: bytes | bytearray | memoryview = b"",
        ranges: Iterable[Range] = (),
        *,
        host_writes: bool = False,
        timeout: float | None = 30.0,
    ) -> bytes:
        """Send a packet and wait for its completion's payload."""
        flags = WAIT_FOR_COMPLETION | (HOST_WRITES if host_writes else 0)
        number = self.send(payload, ranges, flags=flags, timeout=timeout)
        return self.wait(number, timeout).payload

    def receive(self, timeout: float | None = None, capacity: int = 65536) -> Received:
        """Receive a packet that the host sent by itself."""
        buffer = (c_uint8 * capacity)()
        request = _Receive(
            ctypes.addressof(buffer), capacity, 0, 0, 0, 0, 0, _milliseconds(timeout), 0
        )
        self._request(IOC_RECEIVE, request)
        data = bytes(buffer[: request.length])
        header = request.header_length
        return Received(
            request.transaction_id, data[header:], data[:header], request.type,
            bool(request.flags & TO_COMPLETE),
        )  # fmt: skip

    def complete(
        self, transaction_id: int, payload: bytes = b"", timeout: float | None = None
    ) -> None:
        """Complete a received packet."""
        buffer = (c_uint8 * max(len(payload), 1)).from_buffer_copy(payload or b"\0")
        request = _Complete(
            transaction_id, ctypes.addressof(buffer), len(payload), _milliseconds(timeout)
        )
        self._request(IOC_COMPLETE, request)

    def create_gpadl(self, memory: Memory | int) -> Gpadl:
        """A GPADL of all of a memory, or, given a size, of memory that the kernel allocates."""
        if isinstance(memory, Memory):
            request = _Gpadl(memory.address, len(memory))
        else:
            request = _Gpadl(0, memory)
        self._request(IOC_GPADL_CREATE, request)
        return Gpadl(request.handle, request.length, request.mmap_offset)

    def map_gpadl(self, gpadl: Gpadl) -> Memory:
        """The memory of a GPADL that the kernel allocated."""
        return Memory(gpadl.length, self._fd, gpadl.mmap_offset)

    def delete_gpadl(self, gpadl: Gpadl) -> None:
        """Delete it; waits until the host has let go of it."""
        fcntl.ioctl(self._fd, IOC_GPADL_DELETE, gpadl.handle.to_bytes(4, "little"))


def bind(class_id: str | UUID) -> None:
    """Have the driver take devices of a class, now and later."""
    if not DRIVER.exists():
        os.system("modprobe vmbus_user")
    with contextlib.suppress(FileExistsError):
        (DRIVER / "new_id").write_text(str(class_id))


def nodes(class_id: str | UUID) -> list[Path]:
    """The nodes of a class's devices that the driver has."""
    found = []
    for device in sorted(DEVICES.iterdir()):
        with contextlib.suppress(OSError):
            if (device / "class_id").read_text().strip(" {}\n").lower() != str(class_id).lower():
                continue
            for node in (device / "vmbus_user").iterdir():
                found.append(NODES / node.name.removeprefix("vmbus!"))
    return found


def find_node(class_id: str | UUID, patience: float = 10.0) -> Path:
    """The node of the first device of a class. Raises FileNotFoundError after ``patience``."""
    deadline = time.monotonic() + patience
    while True:
        for node in nodes(class_id):
            if node.exists():
                return node
        if time.monotonic() > deadline:
            raise FileNotFoundError(errno.ENOENT, "no device of this class", str(class_id))
        time.sleep(0.02)
