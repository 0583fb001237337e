# SPDX-License-Identifier: GPL-2.0-or-later
"""What stays in the cache: what is used, and what was lately."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.waiting import together
from vhostvmbus.vm import images
from vhostvmbus.vm.cache import KEPT_LOGS, UNUSED_SECONDS, cache_root, new_log, use
from vhostvmbus.vm.errors import SetupError

OLD, NEW = "0123456789abcdef0123", "fedcba9876543210fedc"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A room of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    room = cache_root() / "images" / "kernel-6.1"
    room.mkdir(parents=True)
    return room


def made(path: Path, unused: float) -> Path:
    """A folder with something in it, that was used ``unused`` seconds ago."""
    (path / "lib").mkdir(parents=True)
    (path / "lib" / "file").write_text("x")
    return aged(path, unused)


def aged(path: Path, unused: float) -> Path:
    os.utime(path, (time.time() - unused,) * 2)
    return path


def test_what_was_not_used_for_long_goes(room: Path) -> None:
    made(room / OLD, UNUSED_SECONDS + 60)
    lately = made(room / "89abcdef89abcdef89ab", UNUSED_SECONDS - 60)
    result = made(room / NEW, 2 * UNUSED_SECONDS)
    version = room / "version"
    version.write_text("6.1")
    aged(version, 2 * UNUSED_SECONDS)
    neighbour = made(room.parent / "root" / OLD, 2 * UNUSED_SECONDS)
    assert use(result)
    assert sorted(room.iterdir()) == sorted([lately, result, version])
    assert (result / "lib" / "file").read_text() == "x"
    assert time.time() - result.stat().st_mtime < 60
    assert neighbour.exists()  # another kind, of which nothing is used


def test_results_that_are_files(room: Path) -> None:
    old, new = room / f"6.1.0-53-amd64-{OLD}.cpio", room / f"6.12-{NEW}.cpio"
    for path in (old, new):
        path.write_bytes(b"x")
        aged(path, 2 * UNUSED_SECONDS)
    assert use(new)
    assert list(room.iterdir()) == [new]


def test_a_file_in_a_result_stands_for_it(room: Path) -> None:
    result = made(room / NEW, 2 * UNUSED_SECONDS)
    assert use(result / "lib")
    assert time.time() - result.stat().st_mtime < 60
    assert not use(result / "bin")


def test_what_is_not_in_the_cache_is_left_alone(tmp_path: Path, room: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    old, result = made(elsewhere / OLD, 2 * UNUSED_SECONDS), made(elsewhere / NEW, 1000)
    assert use(result)
    assert old.exists()
    assert time.time() - result.stat().st_mtime >= 1000
    assert not use(elsewhere / "nothing")


def test_a_cache_that_is_not_ours_is_left_alone(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, result = made(room / OLD, 2 * UNUSED_SECONDS), made(room / NEW, 1000)

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refused)
        assert use(result)
    assert old.exists()


def test_nothing_goes_while_another_stamps_it(room: Path) -> None:
    """Who is about to use an old result has the lock; who would remove it waits, and sees that."""
    old, result = made(room / OLD, 2 * UNUSED_SECONDS), made(room / NEW, 0)
    remover = threading.Thread(target=use, args=(result,))
    with open(cache_root() / ".lock-used", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remover.start()
        time.sleep(0.1)
        assert remover.is_alive()
        os.utime(old)
    remover.join(10)
    assert not remover.is_alive()
    assert (old / "lib" / "file").exists()


def test_nobody_else_can_hold_the_lock(room: Path) -> None:
    lock = cache_root() / ".lock-used"
    lock.touch(mode=0o644)
    assert use(made(room / NEW, 0))
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600


def test_many_at_once(room: Path) -> None:
    """Half of them use the old one: it is whole for who was told that it is there."""
    result = made(room / NEW, 0)

    def whole(path: Path) -> None:
        assert not use(path) or (path / "lib" / "file").exists()

    for _ in range(30):
        old = room / OLD
        if not old.exists():
            made(old, 2 * UNUSED_SECONDS)
        aged(old, 2 * UNUSED_SECONDS)
        together(*(partial(whole, path) for path in (old, result) * 2))
    assert not list(room.glob(".work-*"))


def recipe_in(tree: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "TREE", tree)
    program = tree / "build"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_a_recipe_whose_result_went_at_once_runs_again(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"[ -e {tmp_path}/ran ] && mkdir {room}/{NEW}; : >{tmp_path}/ran; echo {room}/{NEW}"
    recipe_in(tmp_path, text, monkeypatch)
    assert images.recipe("build") == room / NEW
    assert (room / NEW).is_dir()


def test_a_recipe_without_a_result_is_an_error(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_in(tmp_path, f"echo {room}/{NEW}", monkeypatch)
    with pytest.raises(SetupError, match=NEW):
        images.recipe("build")


@pytest.mark.usefixtures("room")
def test_the_newest_logs_of_a_kind_stay() -> None:
    other = new_log("console", "x")
    other.touch()
    aged(other, 1e6)
    for number in range(2 * KEPT_LOGS):
        path = new_log("device", f"{number:02}")
        assert not path.exists()
        path.touch()
        aged(path, 1000 - number)
    names = [path.name for path in sorted(path.parent.glob("device-*"))]
    first = 2 * KEPT_LOGS - KEPT_LOGS - 1
    assert names == [f"device-{number:02}.log" for number in range(first, 2 * KEPT_LOGS)]
    assert other.exists()
