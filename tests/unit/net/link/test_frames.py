# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames on a stream socket: however the bytes are cut, whatever the lengths say."""

import contextlib
import select
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostvmbus.devices.net.link.frames import MAX_FRAME, MIN_FRAME, FrameSocket, StreamBroken


@contextlib.contextmanager
def connected() -> Iterator[tuple[FrameSocket, socket.socket]]:
    ours, theirs = socket.socketpair()
    frames = FrameSocket(ours)
    with theirs, contextlib.closing(frames):
        yield frames, theirs


def stream(*frames: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


def take(frames: FrameSocket, *sizes: int) -> bytes | None:
    room = bytearray(sum(sizes))
    view, places = memoryview(room), []
    for size in sizes:
        places.append(view[:size])
        view = view[size:]
    size = frames.receive_into(places)
    return None if size is None else bytes(room[:size])


def readable(frames: FrameSocket) -> bool:
    return bool(select.select([frames.socket], [], [], 0)[0])


FRAMES = st.lists(st.binary(min_size=MIN_FRAME, max_size=200), min_size=1, max_size=6)


@given(FRAMES, st.lists(st.integers(1, 90), min_size=1, max_size=30), st.integers(1, 150))
def test_however_the_stream_is_cut(contents: list[bytes], cuts: list[int], first: int) -> None:
    data = stream(*contents)
    received = []
    with connected() as (frames, peer):
        position = 0
        while position < len(data):
            size = cuts.pop(0) if cuts else 1000
            peer.sendall(data[position : position + size])
            position += size
            while (frame := take(frames, first, 40, 300)) is not None:
                received.append(frame)
            assert not readable(frames)
        assert received == contents
        assert frames.take_too_long() == 0


def test_readable_as_long_as_a_frame_waits() -> None:
    contents = [bytes([number]) * (MIN_FRAME + number) for number in range(5)]
    with connected() as (frames, peer):
        peer.sendall(stream(*contents))
        for frame in contents:
            assert readable(frames)
            assert take(frames, 1000) == frame
        assert not readable(frames)
        assert take(frames, 1000) is None


def test_one_that_fits_exactly_and_one_that_does_not() -> None:
    with connected() as (frames, peer):
        peer.sendall(stream(b"a" * 100, b"b" * 101, b"c" * 20))
        assert take(frames, 60, 40) == b"a" * 100
        assert take(frames, 60, 40) == b"c" * 20
        assert frames.take_too_long() == 1
        assert frames.take_too_long() == 0


def test_a_long_one_that_comes_in_parts_is_dropped_whole() -> None:
    data = stream(b"b" * 5000, b"c" * 20)
    with connected() as (frames, peer):
        for start in range(0, len(data), 1000):
            peer.sendall(data[start : start + 1000])
            frame = take(frames, 100)
        assert frame == b"c" * 20
        assert frames.take_too_long() == 1


@pytest.mark.parametrize("size", [0, MIN_FRAME - 1, MAX_FRAME + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_impossible_length(size: int) -> None:
    with connected() as (frames, peer):
        peer.sendall(struct.pack(">I", size) + bytes(100))
        with pytest.raises(StreamBroken, match=f"{size} bytes"):
            take(frames, 1000)


def test_the_end_in_the_middle_of_a_frame() -> None:
    with connected() as (frames, peer):
        peer.sendall(stream(bytes(100))[:50])
        assert take(frames, 1000) is None
        peer.close()
        with pytest.raises(StreamBroken, match="closed"):
            take(frames, 1000)


def test_a_full_socket_takes_whole_frames_only() -> None:
    with connected() as (frames, peer):
        frames.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        sent = []
        for number in range(1000):
            frame = bytes([number % 256]) * 20000
            if not frames.send([frame[:7], frame[7:]]):
                break
            sent.append(frame)
        assert 0 < len(sent) < 1000
        assert not frames.send([bytes(20)])
        other = FrameSocket(peer.dup())
        received = []
        while len(received) < len(sent):
            frames.flush()
            while (frame_ := take(other, 30000)) is not None:
                received.append(frame_)
        assert received == sent
        assert not frames.unfinished
        assert frames.send([bytes(20)])
        assert take(other, 30000) == bytes(20)
        other.close()


@pytest.mark.parametrize("size", [0, MIN_FRAME - 1, MAX_FRAME + 1])
def test_what_is_no_frame_is_not_sent(size: int) -> None:
    with connected() as (frames, peer):
        assert not frames.send([bytes(size)])
        assert not readable(FrameSocket(peer.dup()))


def test_a_frame_in_very_many_pieces() -> None:
    with connected() as (frames, peer):
        assert frames.send([b"x"] * 3000)
        assert peer.recv(5000) == stream(b"x" * 3000)


def test_nobody_at_the_other_end() -> None:
    with connected() as (frames, peer):
        peer.close()
        assert not frames.send([bytes(20)])
