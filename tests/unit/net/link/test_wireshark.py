# SPDX-License-Identifier: GPL-2.0-or-later
"""Recordings in the tools of Wireshark, which have nothing to complain about."""

import contextlib
import json
import subprocess
from pathlib import Path

import pytest

from tests.support.network import Guest, arp, private_network, udp, wait_for
from vhostvmbus.devices.net.link.opening import open_link

HOST, GUEST = bytes([10, 9, 0, 1]), bytes([10, 9, 0, 2])
MAC, BROADCAST = bytes.fromhex("525400000001"), b"\xff" * 6
SIZES = (0, 1, 2, 3, 18, 1400, 1472)


def output(*words: str | Path) -> str:
    """What a program says; a warning is a failure."""
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    # tshark says who runs it, which is no fault of the file's.
    lines = [line for line in done.stderr.splitlines() if "Running as user" not in line]
    assert lines == []
    return done.stdout


def fields(path: Path, *names: str) -> list[list[str]]:
    """Some fields of each frame."""
    words = [word for name in names for word in ("-e", name)]
    checksums = ("-o", "udp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE")
    text = output("tshark", "-n", *checksums, "-r", path, "-T", "fields", *words)
    return [line.split("\t") for line in text.splitlines()]


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Datagrams from a guest, and its question to the host, with the answer."""
    path = tmp_path / "card.pcapng"
    with private_network(), contextlib.closing(
        open_link(f"tap,ip=10.9.0.1/24,pcap={path}")
    ) as link:  # fmt: skip
        guest = Guest(link)
        for size in SIZES:
            assert guest.send(udp(BROADCAST, MAC, GUEST, HOST, (7, 9), bytes(size)))
        guest.send(arp(1, MAC, GUEST, bytes(6), HOST))
        guest.wait(lambda frame: frame[20:22] == b"\x00\x02", "the ARP reply")
        # It is whole at any time, not only at the end.
        wait_for(lambda: len(fields(path, "frame.len")) > len(SIZES) + 1, "the recording", 30)
    return path


def test_tshark_reads_every_frame(recording: Path) -> None:
    seen = fields(
        recording,
        "udp.length",
        "udp.checksum.status",
        "ip.checksum.status",
        "frame.packet_flags_direction",
        "frame.interface_name",
        "eth.src",
        "arp.opcode",
        "frame.time_epoch",
        "_ws.malformed",
    )
    sent = [frame for frame in seen if frame[0] and frame[5] == MAC.hex(":")]
    assert [int(frame[0]) for frame in sent] == [8 + size for size in SIZES]
    assert {tuple(frame[1:3]) for frame in sent} == {("1", "1")}  # good
    (question,) = (frame for frame in seen if frame[6] == "1" and frame[5] == MAC.hex(":"))
    (answer,) = (frame for frame in seen if frame[6] == "2")
    assert {frame[3] for frame in (*sent, question)} == {"0x00000001"}  # inbound
    assert answer[3] == "0x00000002"
    assert {frame[4] for frame in seen} == {"vmbus0"}
    times = [float(frame[7]) for frame in seen]
    assert times == sorted(times)
    assert float(answer[7]) >= float(question[7])
    assert {frame[8] for frame in seen} == {""}


def test_capinfos_describes_the_file(recording: Path) -> None:
    text = output("capinfos", "-M", recording)
    found = {
        name.strip(): value.strip()
        for name, colon, value in (line.partition(":") for line in text.splitlines())
        if colon
    }
    assert found["File type"] == "pcapng"
    assert found["File encapsulation"] == "ether"
    assert found["File timestamp precision"] == "nanoseconds (9)"
    assert int(found["Number of packets"]) == len(fields(recording, "frame.len"))
    assert found["Strict time order"] == "True"


def test_large_segments_are_whole(tmp_path: Path) -> None:
    """64 KiB in one frame, which is more than any wire takes."""
    path = tmp_path / "large.pcapng"
    with private_network(), contextlib.closing(open_link(f"tap,mtu=65520,pcap={path}")) as link:
        assert Guest(link).send(udp(BROADCAST, MAC, GUEST, HOST, (7, 9), bytes(65000)))
    text = output("tshark", "-n", "-r", path, "-T", "json", "-Y", "udp.dstport == 9")
    (frame,) = json.loads(text)
    assert frame["_source"]["layers"]["udp"]["udp.length"] == "65008"
