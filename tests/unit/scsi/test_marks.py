# SPDX-License-Identifier: GPL-2.0-or-later
"""Marks of files: the same as long as the file is there, and of no other."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from vhostvmbus.devices.scsi import marks


def mark(path: Path) -> bytes:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        return marks.mark_of(fd)
    finally:
        os.close(fd)


def test_a_file_keeps_its_mark(tmp_path: Path) -> None:
    first = mark(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"other contents")
    os.rename(tmp_path / "a", tmp_path / "b")
    assert mark(tmp_path / "b") == first
    assert mark(tmp_path / "a") != first


def test_a_file_that_was_made_anew_has_another(tmp_path: Path) -> None:
    """A file system gives a number away again at once."""
    seen = set()
    for _ in range(8):
        seen.add(mark(tmp_path / "a"))
        os.unlink(tmp_path / "a")
    assert len(seen) == 8


@given(st.dictionaries(st.integers(0, 254), st.binary(min_size=7, max_size=7)))
@example({lun: bytes((lun,)) * 7 for lun in range(254, -1, -1)})
def test_a_note_has_room_for_the_first_disks(disks: dict[int, bytes]) -> None:
    note = marks.pack(disks)
    assert len(note) <= 256
    assert marks.parse(note) == {lun: disks[lun] for lun in sorted(disks)[: marks.MAX_MARKS]}


@given(st.binary(max_size=256))
def test_any_note(note: bytes) -> None:
    for data in (note, b"DSK1" + note):
        assert all(len(found) == 7 for found in marks.parse(data).values())
    assert marks.parse(b"") == {}
