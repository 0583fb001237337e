# SPDX-License-Identifier: GPL-2.0-or-later
"""Output, logs and copies that cannot be written: nothing is lost in silence."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import eventually
from vhostvmbus.vm import images
from vhostvmbus.vm.cache import cache_root, new_log
from vhostvmbus.vm.errors import SetupError
from vhostvmbus.vm.streams import Sink, Streams


@pytest.fixture
def full() -> Iterator[int]:
    """A descriptor of a full disk."""
    fd = os.open("/dev/full", os.O_WRONLY)
    yield fd
    os.close(fd)


def sink_to(fd: int) -> Sink:
    def write(data: bytes) -> None:
        os.write(fd, data)

    return write


def test_a_full_disk_for_the_log_hides_nothing(tmp_path: Path) -> None:
    """Neither a panic nor the console from those who look at it."""
    with open("/dev/full", "wb", buffering=0) as log:
        streams = Streams(log)
        shown = bytearray()
        streams.console.sinks.append(shown.extend)
        theirs = streams._theirs["console"].dup()
        streams.start()
        theirs.sendall(b"[    1.5] Kernel panic - not syncing: VFS\r\n")
        eventually(lambda: streams.console.panic)
        assert shown.endswith(b"VFS\r\n")
        assert streams.log_error is not None
        assert streams.log_error.errno == errno.ENOSPC
        theirs.close()
        streams.close()


def test_output_that_is_not_taken_is_noted_and_that_a_reader_has_gone_is_not(full: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(os.devnull, "wb", buffering=0) as log:
        streams = Streams(log)
        streams.stdout, streams.stderr = sink_to(full), sink_to(writer)
        theirs = {name: sock.dup() for name, sock in streams._theirs.items()}
        streams.start()
        theirs["stdout"].sendall(b"output")
        theirs["stderr"].sendall(b"errors")
        theirs["control"].sendall(b"exit 1 0\n")
        eventually(lambda: streams.control.exits)
        assert {name: error.errno for name, error in streams.lost.items()} == {
            "stdout": errno.ENOSPC
        }
        for sock in theirs.values():
            sock.close()
        streams.close()
    os.close(writer)


def test_a_copy_that_does_not_fit_says_which(tmp_path: Path) -> None:
    source, target = tmp_path / "a.img", tmp_path / "b.img"
    source.write_bytes(b"x" * (1 << 20))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(SetupError, match=rf"a\.img cannot be copied to {target}: File too"):
            images.copy_sparse(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("variables", "uid", "words"),
    [
        ({}, 61234, "there is no folder for the cache: set HOME or XDG_CACHE_HOME"),
        ({"HOME": ""}, 61234, "there is no folder"),
        ({"HOME": "relative"}, 0, "cannot be in relative"),
        ({"XDG_CACHE_HOME": "relative"}, 0, "cannot be in relative"),
    ],
)
def test_a_cache_without_a_home(
    variables: dict[str, str], uid: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "getuid", lambda: uid)
    with pytest.raises(SetupError, match=words):
        cache_root()


def test_what_guests_say_is_their_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert new_log("console", "x").parent.stat().st_mode & 0o777 == 0o700
