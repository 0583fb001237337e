# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings are read back by a reader that knows the format from its description only."""

import resource
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from vhostvmbus.devices.net.link import PLAIN, Buffer, LinkDown, Offload, pcap, spec
from vhostvmbus.devices.net.link.none import NoLink


class Block:
    """One block of a pcapng file: its type and what is between the two lengths."""

    def __init__(self, kind: int, body: bytes) -> None:
        self.kind = kind
        self.body = body


def blocks(data: bytes) -> list[Block]:
    """The file's blocks; the file must end with the last one."""
    found = []
    while data:
        kind, size = struct.unpack_from("<II", data)
        assert size % 4 == 0
        assert 12 <= size <= len(data)
        assert struct.unpack_from("<I", data, size - 4)[0] == size
        found.append(Block(kind, data[8 : size - 4]))
        data = data[size:]
    return found


def options(data: bytes) -> dict[int, bytes]:
    found = {}
    while True:
        code, size = struct.unpack_from("<HH", data)
        if code == 0:
            assert data == bytes(4)
            return found
        found[code] = data[4 : 4 + size]
        data = data[4 + size + -size % 4 :]


def frames(path: Path) -> list[tuple[int, bytes, int]]:
    """Direction, contents and time of each frame."""
    section, interface, *packets = blocks(path.read_bytes())
    assert section.kind == 0x0A0D0D0A
    assert struct.unpack("<IHHq", section.body) == (0x1A2B3C4D, 1, 0, -1)
    assert interface.kind == 1
    assert struct.unpack_from("<HHI", interface.body) == (1, 0, 1 << 18)
    assert options(interface.body[8:])[9] == b"\x09"
    found = []
    for packet in packets:
        assert packet.kind == 6
        number, high, low, size, original = struct.unpack_from("<IIIII", packet.body)
        assert number == 0
        assert size == original
        rest = 20 + size + -size % 4
        assert not any(packet.body[20 + size : rest])
        (flags,) = struct.unpack("<I", options(packet.body[rest:])[2])
        found.append((flags, packet.body[20 : 20 + size], high << 32 | low))
    return found


class Echo(NoLink):
    """Gives back what was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[bytes] = []
        self.takes = True

    def send(self, queue: int, pieces: Sequence[Buffer], offload: Offload) -> bool:
        if self.takes:
            self.frames.append(b"".join(pieces))
        return self.takes

    def receive_into(self, queue: int, buffers: Sequence[memoryview]) -> tuple[int, Offload] | None:
        if not self.frames:
            return None
        frame = self.frames.pop(0)
        left = memoryview(frame)
        for buffer in buffers:
            part = left[: len(buffer)]
            buffer[: len(part)] = part
            left = left[len(part) :]
        return len(frame), PLAIN


def test_both_directions_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    before = time.time_ns()
    link = pcap.Recorded(Echo(), str(path))
    contents = [bytes([size % 256]) * size for size in (14, 15, 16, 17, 1514, 65553)]
    expected = []
    for frame in contents:
        assert link.send(0, [frame[:10], memoryview(frame)[10:]], PLAIN)
        expected.append((pcap.INBOUND, frame))
        assert [found[:2] for found in frames(path)] == expected  # at once, not at the end
        room = memoryview(bytearray(70000))
        assert link.receive_into(0, [room[:15], room[15:]]) == (len(frame), PLAIN)
        expected.append((pcap.OUTBOUND, frame))
    assert link.receive_into(0, [memoryview(bytearray(100))]) is None
    found = frames(path)
    assert [frame[:2] for frame in found] == expected
    times = [frame[2] for frame in found]
    assert times == sorted(times)
    assert before <= times[0]
    assert times[-1] <= time.time_ns()
    assert link.stats() == {"not_recorded": 0}
    link.close()
    link.close()


def test_what_the_link_refused_did_not_cross(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    echo = Echo()
    echo.takes = False
    link = pcap.Recorded(echo, str(path))
    assert not link.send(0, [bytes(60)], PLAIN)
    link.close()
    assert frames(path) == []


def test_in_very_many_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    link = pcap.Recorded(Echo(), str(path))
    link.send(0, [b"x"] * 3000, PLAIN)
    link.close()
    assert [frame[1] for frame in frames(path)] == [b"x" * 3000]


def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pcap, "RETRY", 0.2)
    path = tmp_path / "a.pcapng"
    link = pcap.Recorded(Echo(), str(path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10000, hard))
    try:
        for _ in range(20):
            assert link.send(0, [b"a" * 1000], PLAIN)  # traffic goes on
        recorded = frames(path)  # whole blocks, nothing half
        assert 8 <= len(recorded) <= 9
        assert link.stats()["not_recorded"] == 20 - len(recorded)
        assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    time.sleep(0.3)
    assert link.send(0, [b"b" * 100], PLAIN)
    assert frames(path)[-1][1] == b"b" * 100
    assert link.stats()["not_recorded"] == 20 - len(recorded)
    link.close()


def test_an_older_file_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    path.write_bytes(b"something longer than a header" * 100)
    link = spec.open(f"none,pcap={path}")
    with pytest.raises(LinkDown, match="another one records there"):
        spec.open(f"none,pcap={path}")
    assert frames(path) == []
    link.close()
    spec.open(f"none,pcap={path}").close()


@pytest.mark.parametrize("name", ["/dev/null", "/nonexistent/a.pcapng", "/tmp"])
def test_where_nothing_can_be_recorded(name: str) -> None:
    with pytest.raises(LinkDown, match="pcap="):
        spec.open(f"none,pcap={name}")
