# SPDX-License-Identifier: GPL-2.0-or-later
"""Ports: frames on a stream, however the bytes are cut and whatever the lengths say; datagrams with
a header; and descriptors that come and go."""

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.vnet import Offload
from vhostvmbus.devices.net.link.port import Framing, Port

MIN_FRAME, MAX_FRAME = 14, 65535 + 18


@contextlib.contextmanager
def connected(
    framing: Framing = Framing.STREAM, wake_fd: int = -1
) -> Iterator[tuple[Port, socket.socket, socket.socket]]:
    """A port, its own end, and the other one."""
    kind = socket.SOCK_STREAM if framing is Framing.STREAM else socket.SOCK_SEQPACKET
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    ours.setblocking(False)
    with ours, theirs, contextlib.closing(Port(framing, wake_fd)) as port:
        port.put(ours.fileno())
        yield port, ours, theirs


def stream(*frames: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


def take(port: Port, room: int = 1000) -> bytes | None:
    received = port.receive(room)
    if received is None:
        return None
    header, frame = received
    assert header == bytes(10)  # nothing is left undone in a stream
    return frame


def readable(port: Port) -> bool:
    return bool(select.select([port.fileno()], [], [], 0)[0])


def from_passt(payload: bytes, source: int = 1) -> bytes:
    """A frame to a guest, from a station with this number."""
    return bytes.fromhex("525400000001") + bytes([2, 0, 0, 0, 0, source]) + b"\x08\x06" + payload


FRAMES = st.lists(st.binary(max_size=200).map(from_passt), min_size=1, max_size=6)


# -- a stream --------------------------------------------------------------------------------------


@given(FRAMES, st.lists(st.integers(1, 90), min_size=1, max_size=30))
def test_however_the_stream_is_cut(contents: list[bytes], cuts: list[int]) -> None:
    data = stream(*contents)
    received = []
    with connected() as (port, _, peer):
        position = 0
        while position < len(data):
            size = cuts.pop(0) if cuts else 1000
            peer.sendall(data[position : position + size])
            position += size
            while (frame := take(port)) is not None:
                received.append(frame)
            assert not readable(port)  # whoever waits now waits for something new
        assert received == contents
        assert port.too_long == 0


def test_very_many_of_all_lengths() -> None:
    """More than is read at once: some begin at its end."""
    lengths = [MIN_FRAME, 60, 1514, 9014, MAX_FRAME, 15, 40000, MAX_FRAME] * 5
    contents = [bytes([number]) * size for number, size in enumerate(lengths)]
    data = memoryview(stream(*contents))
    received: list[bytes] = []
    with connected() as (port, _, peer):
        peer.setblocking(False)
        while len(received) < len(contents):
            with contextlib.suppress(BlockingIOError):
                data = data[peer.send(data[:150000]) :]
            while (frame := take(port, MAX_FRAME)) is not None:
                received.append(frame)
    assert received == contents


def test_one_that_fits_exactly_and_one_that_does_not() -> None:
    with connected() as (port, _, peer):
        peer.sendall(stream(b"a" * 100, b"b" * 101, b"c" * 20))
        assert take(port, 100) == b"a" * 100
        assert take(port, 100) == b"c" * 20
        assert port.too_long == 1


def test_a_long_one_that_comes_in_parts_is_dropped_whole() -> None:
    data = stream(b"b" * 5000, b"c" * 20)
    with connected() as (port, _, peer):
        for start in range(0, len(data), 1000):
            peer.sendall(data[start : start + 1000])
            frame = take(port, 100)
        assert frame == b"c" * 20
        assert port.too_long == 1


@pytest.mark.parametrize("alone", [1, 2, 20])
@pytest.mark.parametrize("length", [MIN_FRAME, 42, 60000])
@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_lengths_whose_frames_do_not_come(alone: int, length: int, cut: int) -> None:
    """They are passed over: the frames before and after them are whole."""
    contents = [from_passt(bytes([number]) * 28) for number in range(4)]
    data = stream(contents[0]) + struct.pack(">I", length) * alone + stream(*contents[1:3])
    data += struct.pack(">I", length) + stream(contents[3])
    received = []
    with connected() as (port, _, peer):
        for start in range(0, len(data), cut):
            peer.sendall(data[start : start + cut])
            while (frame := take(port)) is not None:
                received.append(frame)
        assert received == contents
        assert port.missing == alone + 1
        assert port.broken is None


def test_frames_of_several_stations() -> None:
    """Another source address does not make a length one without a frame, nor does a frame that
    looks like a length."""
    contents = [from_passt(bytes(28), source) for source in (1, 2, 1, 3)]
    contents += [stream(contents[0]), contents[0], bytes(60), contents[0]]
    with connected() as (port, _, peer):
        peer.sendall(stream(*contents))
        assert [take(port) for _ in contents] == contents
        assert port.missing == 0


@pytest.mark.parametrize("size", [0, MIN_FRAME - 1, MAX_FRAME + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_impossible_length(size: int) -> None:
    with connected() as (port, _, peer):
        peer.sendall(stream(b"good" * 10) + struct.pack(">I", size) + bytes(100))
        assert take(port) == b"good" * 10
        assert port.broken is None
        assert take(port) is None
        assert port.broken == f"a frame of {size} bytes"
        peer.setblocking(False)
        assert peer.recv(100) == b""  # who looks after the connection sees that it is over
        assert not port.send(bytes(20))


def test_the_end_in_the_middle_of_a_frame() -> None:
    with connected() as (port, _, peer):
        peer.sendall(stream(bytes(100))[:50])
        assert take(port) is None
        peer.close()
        assert take(port) is None
        assert port.broken == "the connection was closed"


def test_a_full_socket_takes_whole_frames_only() -> None:
    wake_fd = os.eventfd(0, os.EFD_NONBLOCK)
    with connected(wake_fd=wake_fd) as (port, ours, peer):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        sent = []
        for number in range(1000):
            frame = bytes([number % 256]) * 20000
            if not port.send(frame):
                break
            sent.append(frame)
        assert 0 < len(sent) < 1000
        assert os.eventfd_read(wake_fd) >= 1  # the rest of the last one waits
        assert not port.flush()
        assert not port.send(bytes(20))
        assert port.refused == 2
        peer.setblocking(False)
        with contextlib.closing(Port(Framing.STREAM)) as other:
            other.put(peer.fileno())
            received = []
            while len(received) < len(sent):
                port.flush()
                while (frame_ := take(other, 30000)) is not None:
                    received.append(frame_)
            assert received == sent
            assert port.flush()
            assert port.send(bytes(20))
            assert take(other, 30000) == bytes(20)
    os.close(wake_fd)


def from_passt(payload: bytes, source: int = 1) -> bytes:
    """A frame to a guest, from a station with this number."""
    return bytes.fromhex("525400000001") + bytes([2, 0, 0, 0, 0, source]) + b"\x08\x06" + payload


@pytest.mark.parametrize("size", [0, MIN_FRAME - 1, MAX_FRAME + 1])
def test_what_is_no_frame_is_not_sent(size: int) -> None:
    with connected() as (port, _, peer):
        assert not port.send(bytes(size))
        assert not select.select([peer], [], [], 0)[0]


@pytest.mark.parametrize("offload", [Offload(needs_checksum=True, start=14, offset=6),
                                     Offload(gso=1, segment_size=1400)])  # fmt: skip
def test_nothing_is_left_undone_on_a_stream(offload: Offload) -> None:
    with connected() as (port, _, peer):
        assert not port.send(bytes(100), offload.pack())
        assert not select.select([peer], [], [], 0)[0]


def test_nobody_at_the_other_end() -> None:
    with connected() as (port, _, peer):
        peer.close()
        assert not port.send(bytes(20))


def test_another_connection_begins_anew() -> None:
    """Nothing of a frame that had begun on the one before, in either direction, gets into it."""
    with connected() as (port, ours, peer), connected() as (_, new, new_peer):
        peer.sendall(stream(bytes(100))[:50])
        assert take(port) is None
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        while port.send(bytes(20000)):
            pass
        assert not port.flush()
        number = port.fileno()
        port.put(new.fileno())
        assert port.fileno() == number
        assert port.flush()
        new_peer.sendall(stream(b"x" * 60))
        assert take(port) == b"x" * 60
        assert port.send(b"y" * 60)
        assert new_peer.recv(1000) == stream(b"y" * 60)
        peer.close()
        assert port.broken is None


# -- datagrams -------------------------------------------------------------------------------------


def test_a_header_is_in_front_of_a_datagram() -> None:
    offload = Offload(True, False, 0x1122, 0x3344, 4, 0x5566, 0x7788)
    with connected(Framing.DATAGRAM) as (port, _, peer):
        assert port.send(b"frame" * 10, offload.pack())
        assert peer.recv(1000) == bytes.fromhex("01 04 8877 6655 2211 4433") + b"frame" * 10
        peer.sendall(offload.pack() + b"other" * 10)
        assert port.receive() == (offload.pack(), b"other" * 10)
        assert port.receive() is None
        with pytest.raises(ValueError, match="10 bytes"):
            port.send(b"frame" * 10, b"short")


def test_a_datagram_that_just_fits_and_one_that_does_not() -> None:
    with connected(Framing.DATAGRAM) as (port, _, peer):
        for size in (101, 100):
            peer.sendall(bytes(10 + size))
        assert port.receive(100) == (bytes(10), bytes(100))
        assert port.too_long == 1


# -- descriptors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", list(Framing))
def test_nothing_is_behind_an_empty_port(framing: Framing) -> None:
    before = len(os.listdir("/proc/self/fd"))
    port = Port(framing)
    for _ in range(2):
        assert not readable(port)
        assert port.receive() is None
        assert port.broken is None
        assert not port.send(bytes(60))
        port.empty()
    assert port.refused == 2
    port.close()
    port.close()
    assert port.refused == 2
    assert port.fileno() == -1
    assert port.receive() is None
    assert port.broken is None
    assert not port.send(bytes(60))
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_no_descriptor_is_not_put_behind_it() -> None:
    with connected() as (port, _, peer):
        with pytest.raises(OSError, match="Bad file descriptor"):
            port.put(1 << 20)
        assert port.send(bytes(60))
        assert peer.recv(100) == stream(bytes(60))
