# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings are read back by a reader that knows the format from its description only."""

import resource
import socket
import struct
import time
from pathlib import Path

import pytest

from tests.support.waiting import eventually
from vhostvmbus.devices.net.link import LinkDown, pcap
from vhostvmbus.devices.net.link.none import NoLink
from vhostvmbus.devices.net.link.opening import open_link

INBOUND, OUTBOUND = 1, 2


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
        self.ours, self.world = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self._port.put(self.ours.fileno())

    def echo(self) -> None:
        self.world.send(self.world.recv(1 << 17))

    def close(self) -> None:
        super().close()
        self.ours.close()
        self.world.close()


def test_both_directions_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    before = time.time_ns()
    echo = Echo()
    link = pcap.Recorded(echo, str(path))
    contents = [bytes([size % 256]) * size for size in (14, 15, 16, 17, 1514, 65553)]
    expected = []
    for frame in contents:
        assert link.port(0).send(frame)
        expected.append((INBOUND, frame))
        assert [found[:2] for found in frames(path)] == expected  # at once, not at the end
        echo.echo()
        received = link.port(0).receive()
        assert received is not None
        assert received[1] == frame
        expected.append((OUTBOUND, frame))
    assert link.port(0).receive() is None
    found = frames(path)
    assert [frame[:2] for frame in found] == expected
    times = [frame[2] for frame in found]
    assert times == sorted(times)
    assert before <= times[0]
    assert times[-1] <= time.time_ns()
    assert link.stats() == {"not_recorded": 0}
    link.close()
    link.close()
    assert link.stats() == {"not_recorded": 0}


def test_what_the_link_refused_did_not_cross(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    echo = Echo()
    echo.port(0).empty()
    link = pcap.Recorded(echo, str(path))
    assert not link.port(0).send(bytes(60))
    link.close()
    assert frames(path) == []


def test_what_there_was_no_room_for_did_not_cross(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    echo = Echo()
    link = pcap.Recorded(echo, str(path))
    assert link.port(0).send(bytes(60))
    echo.echo()
    assert link.port(0).receive(59) is None
    link.close()
    assert frames(path) == [(INBOUND, bytes(60), frames(path)[0][2])]


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "ERROR"]


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
            assert link.port(0).send(b"a" * 1000)  # traffic goes on
        recorded = frames(path)  # whole blocks, nothing half
        assert 8 <= len(recorded) <= 9
        assert link.stats()["not_recorded"] == 20 - len(recorded)
        eventually(lambda: len(errors(caplog)) == 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    time.sleep(0.3)
    assert link.port(0).send(b"b" * 100)
    assert frames(path)[-1][1] == b"b" * 100
    assert link.stats()["not_recorded"] == 20 - len(recorded)
    eventually(lambda: "recording again" in caplog.text)
    assert len(errors(caplog)) == 1
    link.close()


def test_an_older_file_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "a.pcapng"
    path.write_bytes(b"something longer than a header" * 100)
    link = open_link(f"none,pcap={path}")
    with pytest.raises(LinkDown, match="another one records there"):
        open_link(f"none,pcap={path}")
    assert frames(path) == []
    link.close()
    open_link(f"none,pcap={path}").close()


@pytest.mark.parametrize("name", ["/dev/null", "/nonexistent/a.pcapng", "/tmp"])
def test_where_nothing_can_be_recorded(name: str) -> None:
    with pytest.raises(LinkDown, match="pcap="):
        open_link(f"none,pcap={name}")
