# SPDX-License-Identifier: GPL-2.0-or-later
"""The folder of a run when the cache's path is too long, and others were in ``/tmp`` first."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from itertools import count
from pathlib import Path

import pytest

from vhostvmbus.vm.process import RunFolder, room_for_runs

NOBODY = 65534


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for ``/tmp``, with a cache whose path is too long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("long" * 25)))
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return temporary


def usual(temporary: Path) -> Path:
    return temporary / f"vhostvmbus-{os.geteuid()}"


def test_runs_share_one_short_folder(temporary: Path) -> None:
    first, second = RunFolder(), RunFolder()
    assert first.path.parent == second.path.parent == usual(temporary)
    assert stat.S_IMODE(usual(temporary).stat().st_mode) == 0o700
    first.close()
    second.close()
    assert [path.name for path in usual(temporary).iterdir()] == [".lock"]


@pytest.mark.parametrize("how", ["a link", "open to others", "somebody else's", "a file"])
def test_what_others_planted_is_not_used(temporary: Path, tmp_path: Path, how: str) -> None:
    planted, elsewhere = usual(temporary), tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if how == "a link":
        planted.symlink_to(elsewhere)
    elif how == "a file":
        planted.touch()
    else:
        planted.mkdir()
        planted.chmod(0o777 if how == "open to others" else 0o755)
        if how == "somebody else's":
            os.chown(planted, NOBODY, NOBODY)
    first = RunFolder()
    room = first.path.parent
    assert room.parent == temporary
    assert room != planted
    assert stat.S_IMODE(room.stat().st_mode) == 0o700
    # The next run finds the same one, and clears up there as anywhere.
    dead = room / "dead"
    dead.mkdir()
    second = RunFolder()
    assert second.path.parent == room
    assert not dead.exists()
    first.close()
    second.close()
    assert not list(elsewhere.iterdir())
    assert how == "a file" or not list(planted.iterdir())


def test_a_cache_of_somebody_elses_is_not_where_runs_are(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="cache-", dir="/tmp") as cache:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert room_for_runs() == Path(cache) / "vhostvmbus" / "runs"
        os.chown(room_for_runs(), NOBODY, NOBODY)
        assert room_for_runs() == usual(temporary)


def test_one_whose_making_a_signal_ends_is_not_left(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    calls = count(1)

    def flock(fd: int, operation: int) -> None:
        if next(calls) == 2:  # of the folder itself, after that of the room
            raise KeyboardInterrupt
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with contextlib.suppress(KeyboardInterrupt):
        RunFolder()
    assert [path.name for path in usual(temporary).iterdir()] == [".lock"]
