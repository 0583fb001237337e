# SPDX-License-Identifier: GPL-2.0-or-later
"""The backing store: raw image files and block devices of the host.

Reads and writes go straight between the file and the guest's pages (``preadv``/``pwritev`` on
the mapped pages, through :class:`~vhostvmbus.devices.scsi.unit.DataBuffer`).  Flush is
``fdatasync``; discard punches a hole, so a sparse image stays sparse and can become sparse again.

Sizes: a writable image must be a multiple of 512 bytes.  A read-only one of another size is
shown rounded up, and the bytes missing from its last block read as zeroes.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vhostvmbus.devices.scsi.formats import advice, find_format
from vhostvmbus.devices.scsi.locking import DiskLocked, lock_image
from vhostvmbus.devices.scsi.marks import mark_of
from vhostvmbus.devices.scsi.unit import BLOCK_SIZE, DataBuffer, Direct, Identity

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10
"""``fallocate`` modes, ``linux/falloc.h``."""
_BLKDISCARD: Final = 0x1277
_BLKGETSIZE64: Final = 0x80081272
"""``linux/fs.h``."""

_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL)
_CHUNK: Final = 1 << 20
_HOST_PAGE: Final = 4096
_PROBE: Final = (bytearray(1),)
"""A buffer for bytes that nobody looks at, whichever thread asks."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


class DiskError(ValueError):
    """An image cannot be used, or a description cannot be understood."""


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Calls fallocate(2), without the GIL; Python's own ``posix_fallocate`` knows no modes."""
    while _libc.fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class FileDisk:
    """An open image; a :class:`~vhostvmbus.devices.scsi.unit.Backing`.

    Invariants: the size does not change while open; every method can be called from several
    threads; after :meth:`close` each raises ``OSError(EBADF)``.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, read_only: bool = False, raw: bool = False
    ) -> None:
        """Opens and locks the image.

        Raises :class:`DiskError` if it is no raw image (neither file nor block device, empty,
        odd size, or, unless ``raw`` says that it is to be taken for one, in another format),
        :class:`~vhostvmbus.devices.scsi.locking.DiskLocked` if it is in use,
        ``OSError`` if it cannot be opened.
        """
        self.path = os.fspath(path)
        self.read_only = read_only
        mode = os.stat(self.path).st_mode
        self._is_block = stat.S_ISBLK(mode)
        if not (stat.S_ISREG(mode) or self._is_block):
            raise DiskError(f"{self.path}: neither a file nor a block device")
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        # O_EXCL on a block device is refused while the host has it mounted or in a RAID set.
        if self._is_block and not read_only:
            flags |= os.O_EXCL
        self._fd = self._open(flags)
        try:
            lock_image(self._fd, self.path, read_only=read_only)
            self._bytes = self._find_size()
            found = None if raw else find_format(self._fd, self._bytes)
            if found is not None:
                raise DiskError(advice(self.path, found))
            self.size = -(-self._bytes // BLOCK_SIZE) * BLOCK_SIZE
            self._check_size()
            self.can_discard = not read_only and self._probe_discard()
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            raise
        self.discard_zeroes = not self._is_block
        self._can_ask = True
        self.would_wait(0, 1)  # finds out whether that can be asked

    def _open(self, flags: int) -> int:
        try:
            return os.open(self.path, flags)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise DiskLocked(
                errno.EBUSY, "the block device is in use on the host, mounted perhaps", self.path
            ) from None

    def _find_size(self) -> int:
        if not self._is_block:
            return os.fstat(self._fd).st_size
        answer = fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8))
        size: int = struct.unpack("=Q", answer)[0]
        return size

    def _check_size(self) -> None:
        if not self.size:
            raise DiskError(f"{self.path}: empty; to make an image write {self.path}:SIZE")
        if self._bytes % BLOCK_SIZE and not self.read_only:
            raise DiskError(
                f"{self.path}: {self._bytes} bytes are not whole {BLOCK_SIZE}-byte blocks; round "
                f"it up (truncate -s %{BLOCK_SIZE} {self.path}) or use it read-only"
            )

    def _probe_discard(self) -> bool:
        if self._is_block:
            device = os.fstat(self._fd).st_rdev
            link = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
            for queue in (link / "queue", link / ".." / "queue"):  # a partition has its disk's
                limit = queue / "discard_max_bytes"
                if limit.exists():
                    return int(limit.read_text()) > 0
            return False
        try:
            # Past the end of the file: changes nothing, but is refused where it never works.
            _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, self._bytes, _CHUNK)
        except OSError:
            return False
        return True

    def fileno(self) -> int:
        """Returns the open file, which stays the disk's."""
        return self._fd

    def mark(self) -> bytes:
        """Returns what tells this file from all others, whatever their names."""
        return mark_of(self._fd)

    def direct(self) -> Direct | None:
        """Returns the file, for a plan; without the padding of an odd-sized image."""
        if self._fd < 0:
            return None
        return Direct(self._fd, self._bytes, self._can_ask)

    def close(self) -> None:
        """Closes the image and gives up its lock."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __repr__(self) -> str:
        return f"FileDisk({self.path!r}, size={self.size}, read_only={self.read_only})"

    def would_wait(self, offset: int, length: int) -> bool:
        """Returns whether the first or the last page is missing from the page cache.

        Asked with a read of one byte that must not wait (0.6 µs); a file system that does not
        know the question (tmpfs) has its files in memory.
        """
        if not self._can_ask:
            return False
        try:
            os.preadv(self._fd, _PROBE, offset, os.RWF_NOWAIT)
            if length > _HOST_PAGE:
                os.preadv(self._fd, _PROBE, offset + length - 1, os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError as error:
            # Anything else the read itself will report.
            self._can_ask = error.errno != errno.EOPNOTSUPP
        return False

    def read_into(self, data: DataBuffer, offset: int, length: int) -> None:
        """Reads straight into the guest's pages."""
        done = data.preadv(self._fd, offset, 0, length)
        while done < length:  # end of file, or an error that asking again brings out
            more = data.preadv(self._fd, offset + done, done, length - done)
            if not more:
                self._after_end(offset + done)
                data.write(bytes(length - done), done)
                return
            done += more

    def _after_end(self, offset: int) -> None:
        """Allows for the padding of an odd-sized image; else the file has been truncated."""
        if offset < self._bytes:
            raise OSError(errno.EIO, "the image is shorter than when it was opened", self.path)

    def _check_end(self) -> None:
        """Refuses to write to an image that somebody has cut off: it would grow again, with a hole
        in the place of what was lost, which nobody would notice.
        """
        if not self._is_block and os.lseek(self._fd, 0, os.SEEK_END) < self._bytes:
            raise OSError(errno.EIO, "the image is shorter than when it was opened", self.path)

    def write_from(self, data: DataBuffer, offset: int, length: int) -> None:
        """Writes straight from the guest's pages."""
        self._check_end()
        done = 0
        while done < length:
            more = data.pwritev(self._fd, offset + done, done, length - done)
            if not more:
                raise OSError(errno.EIO, f"{done} of {length} bytes written", self.path)
            done += more

    def read(self, offset: int, length: int) -> bytes:
        """Reads bytes for the device's own use."""
        parts = []
        while length:
            part = os.pread(self._fd, length, offset)
            if not part:
                self._after_end(offset)
                part = bytes(length)
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    def write(self, offset: int, payload: bytes) -> None:
        """Writes bytes of the device's own."""
        self._check_end()
        rest = memoryview(payload)
        while rest:
            put = os.pwrite(self._fd, rest, offset)
            offset += put
            rest = rest[put:]

    def flush(self) -> None:
        """Makes all completed writes durable."""
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """Punches a hole.  A host that cannot keeps the data: UNMAP is only a hint."""
        try:
            _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
            return
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
        if self._is_block:
            try:
                fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("=QQ", offset, length))
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Zeroes a range: as a hole if ``unmap``, else allocated, else by writing."""
        self._check_end()
        modes = (_ZERO_RANGE | _KEEP_SIZE, _PUNCH_HOLE | _KEEP_SIZE)
        for mode in reversed(modes) if unmap else modes[:1]:
            try:
                _fallocate(self._fd, mode, offset, length)
                return
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
        zeroes = bytes(min(length, _CHUNK))
        for at in range(0, length, _CHUNK):
            self.write(offset + at, zeroes[: length - at])

    def mapped_extent(self, offset: int) -> tuple[bool, int]:
        """Returns whether data or a hole is at ``offset``, and how far it goes."""
        if self._is_block or not self.can_discard:
            return True, self.size - offset
        # The file position is never used otherwise, and lseek returns its answer by itself.
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole to the end
                return False, self.size - offset
            raise
        if data > offset:
            return False, data - offset
        return True, os.lseek(self._fd, offset, os.SEEK_HOLE) - offset


_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Returns the bytes that ``"2G"``, ``"1.5M"``, ``"512"`` stand for; units are powers of 1024.

    Raises :class:`DiskError` unless it is a positive multiple of 512.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise DiskError(f"{text!r} is not a size; write for example 512M or 2G")
    size = round(float(match[1]) * _UNITS[match[2].upper()])
    if match[2] == "" and "." not in match[1]:
        size = int(match[1])
    if size <= 0 or size % BLOCK_SIZE:
        raise DiskError(f"{text!r}: a size is a positive multiple of {BLOCK_SIZE} bytes")
    return size


def create_image(path: str, size: int) -> bool:
    """Makes a sparse image; returns ``False`` if it is there already with that size.

    Only its owner can read it, whatever the umask is.

    Raises :class:`DiskError` if it is there with another size: an image is never resized.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        found = os.stat(path).st_size
        if found != size:
            raise DiskError(
                f"{path}: exists with {found} bytes, not {size}; leave the size out to use it"
            ) from None
        return False
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.unlink(path)
        raise
    finally:
        os.close(fd)
    return True


@dataclass(frozen=True)
class DiskSpec:
    """A disk as a user describes it; nothing is opened or created yet."""

    path: str
    size: int | None = None
    """Make a sparse image of so many bytes if there is none."""
    read_only: bool = False
    serial: str | None = None
    """Unit serial number; by default made from the path."""
    raw: bool = False
    """Take the image for a raw one whatever it looks like."""

    def identity(self) -> Identity:
        """Returns what the disk will call itself: always the same for the same path or serial."""
        name = self.serial if self.serial is not None else os.path.realpath(self.path)
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
        naa = bytes((0x30 | digest[0] & 0x0F,)) + digest[1:8]
        return Identity(self.serial or digest[:8].hex(), naa)

    def open(self) -> FileDisk:
        """Creates the image if asked to, opens and locks it."""
        if self.size is not None:
            create_image(self.path, self.size)
        return FileDisk(self.path, read_only=self.read_only, raw=self.raw)


def parse_disk(text: str) -> DiskSpec:
    """Returns the :class:`DiskSpec` for ``PATH[:SIZE][,ro][,serial=TEXT][,format=raw]``.

    ``SIZE`` creates a sparse image if there is none.  Commas in a path are fine unless what
    follows is one of the options.  Raises :class:`DiskError`.
    """
    read_only, raw, serial = False, False, None
    path = text
    while "," in path:
        rest, option = path.rsplit(",", 1)
        if option == "ro":
            read_only = True
        elif option.startswith("format="):
            raw = True
            if option != "format=raw":
                raise DiskError(
                    f"{text!r}: raw is the only format; convert the image (qemu-img convert -O raw)"
                )
        elif option.startswith("serial="):
            serial = option.removeprefix("serial=")
            if not re.fullmatch(r"[!-~]{1,32}", serial):
                raise DiskError(f"{serial!r}: a serial is 1 to 32 printable ASCII characters")
        else:
            break
        path = rest
    size = None
    head, colon, tail = path.rpartition(":")
    if colon and head and not os.path.exists(path) and _SIZE.fullmatch(tail):
        path, size = head, parse_size(tail)
    if not path:
        raise DiskError(f"{text!r}: no path")
    if size is not None and read_only and not os.path.exists(path):
        raise DiskError(f"{text!r}: a new image that is read-only would stay empty")
    return DiskSpec(path, size, read_only, serial, raw)
