# SPDX-License-Identifier: GPL-2.0-or-later
"""Archives of the kind that Linux unpacks as its first root file system.

Format: "newc", as in the kernel's ``Documentation/driver-api/early-userspace/
buffer-format.rst``: a 110-byte header of hexadecimal numbers, the name, the data, each padded to
four bytes. Several archives one behind the other, each padded to four bytes, are unpacked in
turn, later files replacing earlier ones; so a run's own files go in an archive of their own
behind a cached one.
"""

import os
import stat
from pathlib import Path

TRAILER = "TRAILER!!!"


class CpioArchive:
    """An archive in the making. Folders are added by themselves; everything belongs to root."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._known: set[str] = set()
        self._inode = 0

    def add_file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Adds a regular file; ``name`` is its absolute path in the guest."""
        self._entry(name, stat.S_IFREG | mode, data)

    def add_link(self, name: str, target: str) -> None:
        """Adds a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def add_folder(self, name: str, mode: int = 0o755) -> None:
        """Adds an empty folder."""
        self._entry(name, stat.S_IFDIR | mode, b"")

    def add_device(self, name: str, mode: int, major: int, minor: int) -> None:
        """Adds a character device node."""
        self._entry(name, stat.S_IFCHR | mode, b"", major, minor)

    def add_tree(self, name: str, source: Path, mode: int | None = None) -> None:
        """Adds a file, or a folder with all below it, keeping links and permission bits."""
        if source.is_symlink():
            self.add_link(name, os.readlink(source))
        elif source.is_dir():
            for entry in sorted(source.iterdir()):
                if entry.name != "__pycache__":
                    self.add_tree(f"{name}/{entry.name}", entry, mode)
        else:
            bits = stat.S_IMODE(source.stat().st_mode) if mode is None else mode
            self.add_file(name, source.read_bytes(), bits)

    def finish(self) -> bytes:
        """Returns the whole archive."""
        self._block(TRAILER, 0, b"", 0, 0)
        blocks, self._blocks = self._blocks, []
        return b"".join(blocks)

    def _entry(self, name: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        name = name.strip("/")
        if name in self._known:
            if stat.S_ISDIR(mode):
                return
            raise ValueError(f"{name} is in the archive already")
        parent = name.rpartition("/")[0]
        if parent and parent not in self._known:
            self._entry(parent, stat.S_IFDIR | 0o755, b"")
        self._known.add(name)
        self._block(name, mode, data, major, minor)

    def _block(self, name: str, mode: int, data: bytes, major: int, minor: int) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        numbers = (
            self._inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(encoded), 0,
        )  # fmt: skip
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        self._blocks += [
            header,
            encoded,
            bytes(-(len(header) + len(encoded)) % 4),
            data,
            bytes(-len(data) % 4),
        ]
