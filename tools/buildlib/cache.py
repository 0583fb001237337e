# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache folder: content keys, locks, and results that appear whole or not at all.

Invariants:

* A finished result is a folder ``<cache>/<room>/<key>`` put there by one rename.
* ``key`` is a hash of everything the result depends on, so a result is never updated.
* A half-made result lives in a folder named ``.work-…`` beside it; it is removed when the build
  ends in any way, and by the next build if this one was killed outright.
"""

import contextlib
import fcntl
import hashlib
import os
import pwd
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

KEY_LENGTH = 20


def cache_root() -> Path:
    """Returns the cache folder, ``$XDG_CACHE_HOME`` or ``~/.cache``, and makes it if absent."""
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        base = os.path.join(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir, ".cache")
    root = Path(base) / "vhostvmbus"
    root.mkdir(parents=True, exist_ok=True)
    return root


def content_key(parts: Iterable[str | bytes | Path]) -> str:
    """Returns a short hash of texts, bytes and files; a folder stands for all files below it.

    File names below a folder count, the folder's own place does not.
    """
    digest = hashlib.sha256()

    def feed(data: bytes) -> None:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)

    for part in parts:
        if isinstance(part, Path):
            if part.is_dir():
                for path in sorted(p for p in part.rglob("*") if p.is_file()):
                    if "__pycache__" in path.parts:
                        continue
                    feed(str(path.relative_to(part)).encode())
                    feed(path.read_bytes())
            else:
                feed(part.read_bytes())
        else:
            feed(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:KEY_LENGTH]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Holds the cache's lock called ``name``. Says so when another process has it."""
    path = cache_root() / f".lock-{name}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):  # whoever can read it could hold it for ever
            os.fchmod(fd, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{name}: another process is at it; waiting for it to finish", file=sys.stderr)
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Removes a folder even if it has folders without write permission in it."""
    if not path.exists():
        return
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def work_folder(room: Path, name: str = "") -> Iterator[Path]:
    """Makes a folder for a half-made result in ``room``; the caller holds the room's lock.

    With a ``name`` its path is the same every time, which a compiler cache likes.
    """
    room.mkdir(parents=True, exist_ok=True)
    for left in room.glob(".work-*"):
        remove_tree(left)
    work = room / f".work-{name}" if name else Path(tempfile.mkdtemp(prefix=".work-", dir=room))
    work.mkdir(exist_ok=True)
    try:
        yield work
    finally:
        remove_tree(work)
