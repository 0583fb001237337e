# SPDX-License-Identifier: GPL-2.0-or-later
"""Statistics: what is counted, the socket that serves it, and the command that shows it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.devices import Digest, Echo, GatheringEcho
from tests.support.paths import TREE
from tests.support.waiting import eventually
from vhostvmbus.channel import ChannelStats
from vhostvmbus.cli import make_parser
from vhostvmbus.guest import HostileChannel, SoftwareGuest, serving
from vhostvmbus.observe.statistics import read_statistics, serving_statistics, statistics_path
from vhostvmbus.vhost_user.errors import SocketInUse
from vhostvmbus.wire.gpa import GpaRange


def shown(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> tuple[int, str, str]:
    options = make_parser().parse_args(["stats", str(path), *words])
    status = options.run(options)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def digest() -> Iterator[tuple[SoftwareGuest, Path]]:
    device = Digest()
    device.channels = device.max_channels = 2
    with (
        serving(device) as (_, path, host),
        serving_statistics(path, host.stats),
        SoftwareGuest.connect(path) as guest,
    ):
        guest.host = host
        yield guest, path


def test_every_kind_of_counter(digest: tuple[SoftwareGuest, Path]) -> None:
    guest, path = digest
    channel = guest.enable(0)
    pfns = guest.ram.alloc_pages(4)
    for _ in range(10):
        channel.send_with_external_pfns(b"command.", pfns)
    HostileChannel(channel.ring, channel.kick_fd).put_gpa_direct([GpaRange(0, 0, [1])])
    eventually(lambda: read_statistics(path)["channels"][0]["errors"])
    found = read_statistics(path)
    (first,) = found["channels"]
    assert first["packets_received"] == 11
    assert first["bytes_received"] == 80
    assert first["external_bytes"] == 10 * 4 * 4096
    assert first["completions_sent"] == 11
    assert first["errors"] == {"GpaRangeEmpty": 1}
    assert 1 <= first["batches"] <= 11
    assert 1 <= first["max_batch"] <= 11
    assert first["signals_sent"] >= 1
    assert (first["outstanding"], first["queued"], first["quota"]) == (0, 0, 1024)
    assert first["ring"]["rx_size"] == 16 * 4096
    assert found["gpadls"] == 1
    assert found["memory_bytes"] == 64 << 20
    assert found["totals"] == {name: first[name] for name in found["totals"]}


def test_signals_that_were_suppressed_are_counted() -> None:
    """Completions into a ring that the guest has not emptied want no signal."""
    with SoftwareGuest.for_device(Echo()) as guest, guest.open_channel() as channel:
        transactions = [channel.submit(b"8 bytes.") for _ in range(200)]
        assert guest.host is not None
        host = guest.host
        eventually(lambda: host.stats()["channels"][0]["completions_sent"] == 200)
        (found,) = host.stats()["channels"]
        assert found["signals_sent"] < 20
        assert found["signals_suppressed"] + found["signals_sent"] >= 200
        for transaction in transactions:
            transaction.wait()


def test_totals_outlive_channels(digest: tuple[SoftwareGuest, Path]) -> None:
    guest, path = digest
    for _ in range(3):
        with guest.open_channel(0) as one, guest.open_channel(1) as other:
            one.send(b"12345678")
            other.send(b"12345678")
    with guest.open_channel(0) as one:
        one.send(b"12345678")
        found = read_statistics(path)
        assert found["totals"]["packets_received"] == 7
        assert [c["packets_received"] for c in found["channels"]] == [1]
    assert read_statistics(path)["totals"]["bytes_received"] == 56
    assert read_statistics(path)["channels"] == []


def test_counters_add_up() -> None:
    one, two = ChannelStats(packets_received=3, max_batch=7), ChannelStats(packets_received=4)
    one.errors["PacketFailed"] += 2
    two.errors.update({"PacketFailed": 1, "GpaRangeEmpty": 5})
    two.max_batch = 5
    one.add(two)
    assert one.packets_received == 7
    assert one.max_batch == 7
    assert one.errors == {"PacketFailed": 3, "GpaRangeEmpty": 5}
    assert two.packets_received == 4


def test_the_text(digest: tuple[SoftwareGuest, Path], capsys: pytest.CaptureFixture[str]) -> None:
    guest, path = digest
    with guest.open_channel() as channel:
        channel.send_with_external_pfns(b"", guest.ram.alloc_pages(256))
        assert guest.host is not None
        guest.host.channels[0].pause(10)
        status, out, err = shown(capsys, path)
        assert (status, err) == (0, "")
        assert out.startswith(f"Digest, class {Digest.class_id}\n")
        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert "guest memory 64.0 MiB in 2 regions; 1 GPADLs, 136.0 KiB" in lines
        assert lines.count("received 1 packets, 0 bytes; external 1.0 MiB") == 2
        assert "channel 0: running, paused" in lines
        assert "outstanding 0 of 1024, 0 wait for space" in lines
        assert "ring from the guest 0 of 65536 bytes used" in lines
        assert lines.count("errors none") == 2
    _, out, _ = shown(capsys, path, "--json")
    assert json.loads(out)["totals"]["external_bytes"] == 1 << 20


def test_a_failed_channel_says_why(
    digest: tuple[SoftwareGuest, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    guest, path = digest
    channel = guest.enable()
    liar = HostileChannel(channel.ring, channel.kick_fd)
    liar.out_ring.write_index = 3
    liar.kick()
    eventually(lambda: read_statistics(path)["channels"][0]["state"] == "failed")
    _, out, _ = shown(capsys, path)
    assert "channel 0: failed" in out
    assert re.search(r"stopped by +RingIndexInvalid: write_index = 0x3", out)
    assert re.search(r"errors +1 RingIndexInvalid", out)


# ---- the socket -------------------------------------------------------------------------


def test_only_the_owner_can_connect(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with serving_statistics(tmp_path / "d.sock", dict) as path:
            assert path == statistics_path(tmp_path / "d.sock") == tmp_path / "d.sock.stats"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            with pytest.raises(SocketInUse), serving_statistics(tmp_path / "d.sock", dict):
                pass
    finally:
        os.umask(old)
    assert not path.exists()


def test_readers_that_misbehave(tmp_path: Path) -> None:
    """One that never reads, one that leaves, one that talks: the next one is served."""
    big = {"text": "x" * (4 << 20)}
    with serving_statistics(tmp_path / "d.sock", lambda: big) as path:
        with contextlib.ExitStack() as stack:
            for data in (b"", b"GET / HTTP/1.1\r\n\r\n"):
                lazy = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                lazy.connect(str(path))
                lazy.sendall(data)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as gone:
                gone.connect(str(path))
            assert read_statistics(tmp_path / "d.sock") == big
        assert read_statistics(tmp_path / "d.sock") == big


def test_a_snapshot_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def snapshot() -> dict[str, object]:
        raise RuntimeError("a bug")

    with serving_statistics(tmp_path / "d.sock", snapshot):
        status, out, err = shown(capsys, tmp_path / "d.sock")
    assert (status, out) == (1, "")
    assert "d.sock.stats" in err
    assert "a bug" in caplog.text


@pytest.mark.parametrize("answer", [b"", b"[]", b"{", b"\xff\xfe", b"no"])
def test_an_answer_that_is_no_document(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: bytes
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "d.sock.stats"))
        listener.listen()

        def serve() -> None:
            reader, _ = listener.accept()
            with reader:
                reader.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        status, _, err = shown(capsys, tmp_path / "d.sock")
        thread.join()
    assert status == 1
    assert err.startswith("vhostvmbus stats: ")


def test_nobody_serves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = shown(capsys, tmp_path / "d.sock")
    assert (status, out) == (1, "")
    assert "d.sock.stats" in err


# ---- the command ------------------------------------------------------------------------


@contextlib.contextmanager
def served(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "vhostvmbus", "serve", "examples/echo.py:Echo", "--socket",
         str(path), "--ready-fd", str(write), *words],
        cwd=TREE, pass_fds=[write], stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(write)
    try:
        assert os.read(read, 1) == b"\n"
        yield process
    finally:
        os.close(read)
        process.terminate()
        assert process.wait(20) is not None
        assert process.stderr is not None
        process.stderr.close()


def test_serve_and_stats_in_processes_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "echo.sock"
    with served(path), SoftwareGuest.connect(path) as guest, guest.open_channel() as channel:
        channel.send(b"12345678")
        done = subprocess.run(
            [sys.executable, "-m", "vhostvmbus", "stats", str(path), "--json"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["channels"][0]["packets_received"] == 1
    assert sorted(tmp_path.iterdir()) == []


def test_watching(tmp_path: Path) -> None:
    path = tmp_path / "echo.sock"
    with served(path):
        command = [sys.executable, "-m", "vhostvmbus", "stats", str(path), "--json"]
        with subprocess.Popen(
            [*command, "--watch", "0.05"], stdout=subprocess.PIPE, text=True
        ) as watching:
            assert watching.stdout is not None
            for _ in range(3):
                assert json.loads(watching.stdout.readline())["name"] == "Echo"
            watching.terminate()


def test_a_device_is_served_without_statistics_too(tmp_path: Path) -> None:
    path = tmp_path / "echo.sock"
    with served(path, "--no-stats"), SoftwareGuest.connect(path):
        assert not statistics_path(path).exists()
    # something in the way costs the statistics only
    statistics_path(path).write_text("mine")
    with served(path), SoftwareGuest.connect(path) as guest, guest.open_channel() as channel:
        assert channel.send(b"12345678") == b"12345678"
    assert statistics_path(path).read_text() == "mine"


def test_few_signals_for_many_packets() -> None:
    """A busy ring costs far fewer signals than packets, in both directions."""
    with SoftwareGuest.for_device(GatheringEcho()) as guest:
        with guest.open_channel(ring_pages=(65, 65)) as channel:
            for _ in range(20):
                batch = [channel.submit(b"8 bytes.") for _ in range(100)]
                for transaction in batch:
                    transaction.wait()
            assert guest.host is not None
            (found,) = guest.host.stats()["channels"]
        assert found["packets_received"] == 2000
        assert found["signals_sent"] < 1000
        assert channel.kicks < 1000
