# SPDX-License-Identifier: GPL-2.0-or-later
"""Image files: sizes, locks, holes, errors of the host, and how a user describes a disk."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scsi_unit import BytesBuffer, pattern
from vhostvmbus.devices.scsi.disk import DiskError, DiskSpec, FileDisk, parse_disk, parse_size
from vhostvmbus.devices.scsi.locking import DiskLocked

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(pattern(MIB))
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[FileDisk]:
    disk = FileDisk(image)
    yield disk
    disk.close()


def allocated(path: Path) -> int:
    os.sync()
    return path.stat().st_blocks * 512


def test_read_and_write(disk: FileDisk, image: Path) -> None:
    buffer = BytesBuffer(8192)
    disk.read_into(buffer, 512, 4096)
    assert bytes(buffer.content) == pattern(MIB)[512:4608] + bytes(4096)
    disk.write_from(BytesBuffer(b"z" * 1024), 1024, 512)
    disk.write(MIB - 512, b"y" * 512)
    assert disk.read(1024, 1024) == b"z" * 512 + pattern(MIB)[1536:2048]
    disk.flush()
    content = image.read_bytes()
    assert content[1024:1536] == b"z" * 512
    assert content[-512:] == b"y" * 512
    assert len(content) == MIB


def test_discard_makes_a_hole_that_reads_as_zero(disk: FileDisk, image: Path) -> None:
    disk.flush()
    before = allocated(image)
    assert disk.can_discard
    assert disk.discard_zeroes
    disk.discard(65536, 524288)
    assert allocated(image) <= before - 524288
    assert image.stat().st_size == MIB
    assert disk.read(65536, 524288) == bytes(524288)
    assert disk.mapped_extent(0) == (True, 65536)
    assert disk.mapped_extent(65536) == (False, 524288)
    disk.discard(0, 512)
    assert disk.read(0, 1024) == bytes(512) + pattern(MIB)[512:1024], "smaller than a host block"


def test_write_zeroes(disk: FileDisk, image: Path) -> None:
    disk.flush()
    before = allocated(image)
    disk.write_zeroes(0, 131072, unmap=False)
    assert allocated(image) >= before - 8192, "stays allocated"
    assert disk.read(0, 131072) == bytes(131072)
    disk.write_zeroes(131072, 131072, unmap=True)
    assert allocated(image) <= before - 131072 + 8192
    assert disk.read(131072, 131072) == bytes(131072)
    assert disk.read(262144, 512) == pattern(MIB)[262144:262656]


def test_zeroes_are_written_where_the_host_knows_no_other_way(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr("vhostvmbus.devices.scsi.disk._fallocate", refuse)
    disk.write_zeroes(512, 1024, unmap=True)
    assert disk.read(0, 2048) == pattern(MIB)[:512] + bytes(1024) + pattern(MIB)[1536:2048]
    disk.discard(4096, 512)
    assert disk.read(4096, 512) == pattern(MIB)[4096:4608], "only a hint: nothing happened"


def test_sparse_image_stays_sparse(tmp_path: Path) -> None:
    path = tmp_path / "new.raw"
    disk = parse_disk(f"{path}:1G").open()
    try:
        assert disk.size == 1 << 30
        assert path.stat().st_blocks == 0
        buffer = BytesBuffer(MIB)
        disk.read_into(buffer, 1 << 29, MIB)
        assert bytes(buffer.content) == bytes(MIB)
        disk.write_from(BytesBuffer(b"x" * 4096), 1 << 28, 4096)
        assert allocated(path) <= 65536
        assert disk.mapped_extent((1 << 28) + 4096) == (False, (1 << 30) - (1 << 28) - 4096)
    finally:
        disk.close()


def test_second_writer_is_refused(disk: FileDisk, image: Path) -> None:
    with pytest.raises(DiskLocked, match=r"in use.*only one may write") as caught:
        FileDisk(image)
    assert str(image) in str(caught.value)
    with pytest.raises(DiskLocked, match="may be writing"):
        FileDisk(image, read_only=True)
    disk.close()
    FileDisk(image).close()


def test_readers_share_but_keep_writers_out(image: Path) -> None:
    first = FileDisk(image, read_only=True)
    second = FileDisk(image, read_only=True)
    with pytest.raises(DiskLocked):
        FileDisk(image)
    first.close()
    with pytest.raises(DiskLocked):
        FileDisk(image)
    second.close()
    FileDisk(image).close()


def test_lock_is_seen_by_another_process(disk: FileDisk, image: Path) -> None:
    script = f"from vhostvmbus.devices.scsi import FileDisk; FileDisk({str(image)!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 1
    assert "DiskLocked" in result.stderr


def test_odd_size(tmp_path: Path) -> None:
    path = tmp_path / "odd.raw"
    path.write_bytes(b"a" * 700)
    with pytest.raises(DiskError, match="truncate -s %512"):
        FileDisk(path)
    disk = FileDisk(path, read_only=True)
    try:
        assert disk.size == 1024
        buffer = BytesBuffer(b"?" * 1024)
        disk.read_into(buffer, 0, 1024)
        assert bytes(buffer.content) == b"a" * 700 + bytes(324)
        assert disk.read(512, 512) == b"a" * 188 + bytes(324)
    finally:
        disk.close()


@pytest.mark.parametrize(
    ("offset", "signature", "says"),
    [
        (0, b"QFI\xfb", "-f qcow2 -O raw"),
        (0, b"vhdxfile", "-f vhdx -O raw"),
        (0, b"conectix", "-f vpc -O raw"),
        (-512, b"conectix", "-f vpc -O raw"),
        (-511, b"conectix", "-f vpc -O raw"),
        (0, b"KDMV", "-f vmdk -O raw"),
        (0, b"COWD", "-f vmdk -O raw"),
        (0, b"# Disk DescriptorFile\n", "-f vmdk -O raw"),
        (0x40, b"\x7f\x10\xda\xbe", "-f vdi -O raw"),
        (0x8001, b"CD001", "an ISO 9660 image"),
    ],
)
@pytest.mark.parametrize("size", [65536, 65536 + 100])
def test_what_is_another_format(
    tmp_path: Path, offset: int, signature: bytes, says: str, size: int
) -> None:
    """It is refused whatever its length, never with the advice to change that."""
    path = tmp_path / "an image.qcow2"
    content = bytearray(size)
    at = offset if offset >= 0 else size + offset
    content[at : at + len(signature)] = signature
    path.write_bytes(content)
    for read_only in (False, True):
        with pytest.raises(DiskError) as caught:
            FileDisk(path, read_only=read_only)
        assert says in str(caught.value)
        assert "format=raw" in str(caught.value)
        assert "truncate" not in str(caught.value)
    assert path.read_bytes() == content
    disk = parse_disk(f"{path},ro,format=raw").open()
    assert disk.read(0, 512) == content[:512]
    disk.close()


@pytest.mark.parametrize(
    ("name", "raw"), [("my disk.qcow2", "my disk.raw"), ("disk.raw", "disk.raw.raw")]
)
def test_the_command_that_is_advised_works(tmp_path: Path, name: str, raw: str) -> None:
    """As far as it can be seen without qemu-img: the words are quoted, the file is another one."""
    path = tmp_path / name
    path.write_bytes(b"QFI\xfb".ljust(1024, b"\0"))
    with pytest.raises(DiskError) as caught:
        FileDisk(path)
    command = str(caught.value).partition("(")[2].partition(")")[0]
    assert shlex.split(command) == [
        "qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(tmp_path / raw),
    ]  # fmt: skip


def test_what_is_no_image(tmp_path: Path) -> None:
    empty = tmp_path / "empty.raw"
    empty.touch()
    with pytest.raises(DiskError, match="empty"):
        FileDisk(empty)
    with pytest.raises(DiskError, match="neither a file nor"):
        FileDisk(tmp_path)
    with pytest.raises(DiskError, match="neither a file nor"):
        FileDisk("/dev/null")
    with pytest.raises(FileNotFoundError):
        FileDisk(tmp_path / "none.raw")


def test_truncated_image_is_an_error_not_zeroes(disk: FileDisk, image: Path) -> None:
    os.truncate(image, 1024)
    buffer = BytesBuffer(2048)
    with pytest.raises(OSError, match="shorter") as caught:
        disk.read_into(buffer, 0, 2048)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="shorter"):
        disk.read(0, 2048)
    disk.read_into(buffer, 0, 1024)


def test_truncated_image_does_not_grow_again(disk: FileDisk, image: Path) -> None:
    os.truncate(image, 1024)
    for write in (
        lambda: disk.write(4096, bytes(512)),
        lambda: disk.write_from(BytesBuffer(512), 0, 512),
        lambda: disk.write_zeroes(4096, 512, unmap=False),
        lambda: disk.write_zeroes(4096, 512, unmap=True),
    ):
        with pytest.raises(OSError, match="shorter") as caught:
            write()
        assert caught.value.errno == errno.EIO
    assert image.read_bytes() == pattern(MIB)[:1024]


def test_write_beyond_the_file_size_limit(disk: FileDisk) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            disk.write_from(BytesBuffer(8192), 65536, 8192)
        assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_closed_disk(image: Path) -> None:
    disk = FileDisk(image)
    disk.close()
    disk.close()
    with pytest.raises(OSError, match="Bad file") as caught:
        disk.read(0, 512)
    assert caught.value.errno == errno.EBADF


def test_read_only_never_discards(image: Path) -> None:
    disk = FileDisk(image, read_only=True)
    assert not disk.can_discard
    assert disk.mapped_extent(0) == (True, MIB)
    with pytest.raises(OSError, match="Bad file"):
        disk.write(0, bytes(512))
    disk.close()


def test_create_only_what_is_not_there(image: Path, tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="exists with 1048576 bytes"):
        DiskSpec(str(image), 2 * MIB).open()
    assert image.read_bytes() == pattern(MIB)
    DiskSpec(str(image), MIB).open().close()
    assert image.read_bytes() == pattern(MIB)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a.raw", DiskSpec("a.raw")),
        ("a.raw,ro", DiskSpec("a.raw", read_only=True)),
        ("new.raw:2G", DiskSpec("new.raw", 2 << 30)),
        ("/x/new.raw:1.5M", DiskSpec("/x/new.raw", 3 << 19)),
        ("a.raw,serial=S-1", DiskSpec("a.raw", serial="S-1")),
        ("a.raw,ro,serial=S", DiskSpec("a.raw", None, True, "S")),
        ("a,b.raw", DiskSpec("a,b.raw")),
        ("a.qcow2,format=raw", DiskSpec("a.qcow2", raw=True)),
        ("a.raw,format=raw,ro", DiskSpec("a.raw", read_only=True, raw=True)),
        ("host:disk.raw", DiskSpec("host:disk.raw")),
        ("a:b:64k", DiskSpec("a:b", 65536)),
    ],
)
def test_parse_disk(text: str, spec: DiskSpec) -> None:
    assert parse_disk(text) == spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no path"),
        (",ro", "no path"),
        (":2G,ro", "No such file"),
        ("new.raw:1K,ro", "would stay empty"),
        ("new.raw:100", "multiple of 512"),
        ("new.raw:0", "multiple of 512"),
        ("a,serial=", "1 to 32 printable"),
        ("a,format=qcow2", "raw is the only format"),
    ],
)
def test_parse_disk_refuses(text: str, says: str) -> None:
    with pytest.raises((DiskError, FileNotFoundError), match=says):
        parse_disk(text).open()


def test_path_that_looks_like_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:2G").touch()
    assert parse_disk("a:2G") == DiskSpec("a:2G")


@given(st.text(max_size=12))
def test_any_size_text(text: str) -> None:
    with contextlib.suppress(DiskError):
        assert parse_size(text) % 512 == 0


def test_identity_is_stable_and_distinct(tmp_path: Path) -> None:
    one, two = (DiskSpec(str(tmp_path / name)).identity() for name in "ab")
    assert one == DiskSpec(str(tmp_path / "a")).identity()
    assert one.naa != two.naa
    assert one.naa[0] >> 4 == 3
    assert len(one.naa) == 8
    named = DiskSpec("x", serial="DISK-7").identity()
    assert named.serial == "DISK-7"
    assert named == DiskSpec("elsewhere", serial="DISK-7").identity()


def test_asks_the_page_cache_without_waiting(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    cold = {65536}

    def preadv(fd: int, buffers: object, offset: int, flags: int) -> int:
        asked.append((offset, flags))
        if offset in cold:
            raise BlockingIOError(errno.EAGAIN, "not now")
        return 1

    disk.read(0, MIB)
    assert not disk.would_wait(0, 4096), "it has just been read"
    monkeypatch.setattr(os, "preadv", preadv)
    assert disk.would_wait(65536, 512)
    assert not disk.would_wait(0, 4096)
    assert disk.would_wait(65537 - 8192, 8192), "the last page counts too"
    assert {flags for _, flags in asked} == {os.RWF_NOWAIT}


def test_a_file_system_that_does_not_know_the_question(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def preadv(fd: int, buffers: object, offset: int, flags: int) -> int:
        asked.append(offset)
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(os, "preadv", preadv)
    assert not disk.would_wait(0, 512)
    assert not disk.would_wait(0, 512)
    assert asked == [0], "asked once, never again"
