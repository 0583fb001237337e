# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk with all of a kernel's modules, which a guest mounts at ``/lib/modules``.

The initramfs has the few that it takes to boot. The disk has the whole of ``lib/modules/<version>``
and the project's own module, in an ext4 image that is made once for each kernel and only read.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from vhostvmbus.vm.cache import cache_root, use
from vhostvmbus.vm.errors import SetupError
from vhostvmbus.vm.initramfs import sbin_tool

SERIAL = "vhostvmbus-modules"
"""The serial number by which the guest knows the disk, however Linux names it."""
BLOCK = 4096
SPARE = 16 << 20
"""Room for what the file system needs for itself, besides an eighth of the files' size."""


def find_modules_disk(
    modules: Path, extras: Path | None, say: Callable[[str], None] = lambda _: None
) -> Path:
    """Returns the image for a kernel's ``lib/modules/<version>``, from the cache or made now.

    ``extras`` is the folder with the project's own module for it, if there is one. ``say`` is told
    when the image has to be made. Raises SetupError if it cannot be.
    """
    dependencies = modules / "modules.dep"
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"{modules} {dependencies.stat().st_mtime_ns}".encode())
    for own in _own_modules(extras):
        digest.update(own.read_bytes())
    room = cache_root() / "images" / "modules-disk"
    room.mkdir(parents=True, exist_ok=True)
    result = room / f"{modules.name}-{digest.hexdigest()[:20]}"
    image = result / "modules.img"
    if use(image):
        return image
    say(f"making the disk with all modules of Linux {modules.name} (usually 5 s)")
    with tempfile.TemporaryDirectory(dir=room, prefix=".work-") as temporary:
        work = Path(temporary)
        try:
            _make(modules, extras, work)
            (work / "made").rename(result)
        except OSError as error:
            if not image.exists():  # else somebody else was faster
                raise SetupError(f"{image} cannot be made: {error.strerror or error}") from error
    return image


def _own_modules(extras: Path | None) -> list[Path]:
    return sorted(extras.glob("*.ko")) if extras else []


def _link(source: str, target: str) -> None:
    """Gives a file a second name, or copies it to another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _make(modules: Path, extras: Path | None, work: Path) -> None:
    release = modules.name
    top = work / "tree" / "lib" / "modules"
    tree = top / release
    shutil.copytree(modules, tree, symlinks=True, copy_function=_link)
    for name in ("build", "source"):  # they lead out of it, to headers that the guest does not have
        if (tree / name).is_symlink():
            (tree / name).unlink()
    for own in _own_modules(extras):
        target = tree / "updates" / own.name
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)  # what is there is a second name of the kernel's file
        shutil.copyfile(own, target)
    _run([sbin_tool("depmod"), "-b", str(work / "tree"), release])
    sizes = [path.lstat().st_size for path in top.rglob("*")]
    used = sum(-(-size // BLOCK) * BLOCK + BLOCK for size in sizes)
    (work / "made").mkdir()
    image = work / "made" / "modules.img"
    with open(image, "xb") as file:
        file.truncate(-(-(used + used // 8 + SPARE) // BLOCK) * BLOCK)
    words = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-b", str(BLOCK)]
    words += ["-E", "root_owner=0:0,lazy_itable_init=1", "-d", str(top), str(image)]
    _run([sbin_tool("mke2fs"), *words])


def _run(command: list[str]) -> None:
    """Runs a program that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(f"{command[0]} failed: {done.stderr.strip()}")
