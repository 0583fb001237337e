# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds a machine's parts: QEMU, kernels, initramfs, root file system, firmware.

The recipes are programs in the project's tree (``qemu/build``, ``guest-images/build``) that make
what is missing and print where it is; their progress goes to stderr. Without the tree (the
package installed by itself) a caller must name QEMU, kernel and root disk.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from vhostvmbus.vm.cache import cache_root, use
from vhostvmbus.vm.errors import SetupError
from vhostvmbus.vm.initramfs import build_initramfs

TREE = Path(__file__).resolve().parents[2]
KERNEL_SERIES = ("6.1", "6.12")
"""The kernels that have the project's own module, and that tests of one kernel run on, each."""

OLD_KERNEL_SERIES = ("5.10",)
"""Kernels that are started as they are, without that module."""

INTERRUPTED = 130
FIRMWARE = (Path("/usr/share/seabios"), Path("/usr/share/qemu"))


def recipe(program: str, *words: str) -> Path:
    """Runs one of the tree's recipes; returns the path that it prints, which is there."""
    result = _run_recipe(program, *words)
    if not use(result):  # it was about to be removed, and is made again
        result = _run_recipe(program, *words)
        if not use(result):
            raise SetupError(f"{program} {' '.join(words)}: there is no {result}")
    return result


def _run_recipe(program: str, *words: str) -> Path:
    path = TREE / program
    if not path.is_file():
        raise SetupError(f"no {program} here: outside the project's tree, name the file to use")
    with subprocess.Popen([path, *words], stdout=subprocess.PIPE, text=True) as child:
        try:
            output, _ = child.communicate()
        except BaseException:
            # It cleans up after itself; subprocess.run() would not let it.
            child.terminate()
            child.wait()
            raise
    if child.returncode != 0:
        if child.returncode == INTERRUPTED:
            raise KeyboardInterrupt
        raise SetupError(f"{program} {' '.join(words)} failed")
    return Path(output.strip())


def qemu_binary(given: str | None = None) -> Path:
    """Returns the QEMU to use: ``given``, ``$VHOSTVMBUS_QEMU``, or the one that the tree builds."""
    named = given or os.environ.get("VHOSTVMBUS_QEMU")
    if not named:
        return recipe("qemu/build")
    found = shutil.which(named)
    if found is None:
        raise SetupError(f"QEMU {named}: no such program")
    binary = Path(found).resolve()
    use(binary)
    return binary


def firmware_folders() -> list[Path]:
    """Returns where QEMU finds its BIOS and ROMs; ``$VHOSTVMBUS_FIRMWARE`` names others."""
    if given := os.environ.get("VHOSTVMBUS_FIRMWARE"):
        return [Path(folder) for folder in given.split(":")]
    if not (FIRMWARE[0] / "bios-256k.bin").is_file():
        raise SetupError("no BIOS: install the packages seabios and qemu-system-data")
    return list(FIRMWARE)


@dataclass(frozen=True)
class Kernel:
    """A guest kernel and its ``lib/modules/<version>``.

    ``extras`` holds the project's own module and tools for it, if there are any.
    """

    image: Path
    modules: Path
    extras: Path | None = None

    @property
    def release(self) -> str:
        """The version that ``uname -r`` says in the guest."""
        return self.modules.name


def find_kernel(name: str, modules: str | None = None) -> Kernel:
    """Returns the kernel called ``name``: a series that the tree fetches, or the path of a vmlinuz.

    ``modules`` goes with a path: its ``lib/modules/<version>``.
    """
    known = (*OLD_KERNEL_SERIES, *KERNEL_SERIES)
    if name in known:
        folder = recipe("guest-images/build", "kernel", name)
        (release,) = (folder / "lib" / "modules").iterdir()
        module = name in KERNEL_SERIES
        extras = recipe("guest-images/build", "module", name) if module else None
        return Kernel(folder / "vmlinuz", release, extras)
    image = Path(name)
    if not image.is_file():
        raise SetupError(
            f"kernel {name}: neither one of {', '.join(known)} nor the path of a vmlinuz"
        )
    if not modules:
        raise SetupError(f"kernel {name}: name its lib/modules/<version> folder too (MODULES=)")
    folder = Path(modules).resolve()
    if not (folder / "modules.dep").is_file():
        raise SetupError(f"{modules} is not a lib/modules/<version> folder: no modules.dep in it")
    return Kernel(image.resolve(), folder)


def find_initramfs(kernel: Kernel) -> Path:
    """Returns the initramfs for ``kernel``, from the cache or made now."""
    scripts = TREE / "guest-images" / "initramfs"
    inittab = TREE / "guest-images" / "root" / "inittab"
    if not scripts.is_dir():
        raise SetupError("no guest-images here: outside the project's tree, name an initramfs")
    busybox = recipe("guest-images/build", "busybox") / "busybox"
    digest = hashlib.sha256()
    extras = sorted(kernel.extras.iterdir()) if kernel.extras else []
    made_of = (*sorted(scripts.iterdir()), inittab, busybox, kernel.modules / "modules.dep")
    for path in (*made_of, *extras):
        digest.update(path.name.encode() + path.read_bytes())
    for path in (Path(__file__), Path(__file__).with_name("initramfs.py")):
        digest.update(path.read_bytes())
    dependencies = kernel.modules / "modules.dep"
    digest.update(f"{kernel.modules} {dependencies.stat().st_mtime_ns}".encode())
    room = cache_root() / "images" / "initramfs"
    room.mkdir(parents=True, exist_ok=True)
    result = room / f"{kernel.release}-{digest.hexdigest()[:20]}.cpio"
    if not use(result):
        data = build_initramfs(scripts, inittab, busybox, kernel.modules, extras)
        with tempfile.NamedTemporaryFile(dir=room, prefix=".work-", delete=False) as work:
            try:
                work.write(data)
                work.flush()
                os.chmod(work.name, 0o644)
                os.replace(work.name, result)
            except BaseException as error:
                os.unlink(work.name)
                if isinstance(error, OSError):
                    raise SetupError(f"{result} cannot be made: {error.strerror}") from error
                raise
    return result


def root_template() -> Path:
    """Returns the image of a guest's root file system; to be copied, never written."""
    return recipe("guest-images/build", "root") / "root.img"


def copy_sparse(source: Path, target: Path) -> None:
    """Copies a file, its holes staying holes, sharing blocks where the file system can."""
    with open(source, "rb") as from_file, open(target, "xb") as to_file:
        from_fd, to_fd = from_file.fileno(), to_file.fileno()
        size = os.fstat(from_fd).st_size
        try:
            os.ftruncate(to_fd, size)
            with contextlib.suppress(OSError):
                fcntl.ioctl(to_fd, 0x40049409, from_fd)  # FICLONE
                return
            _copy_data(from_fd, to_fd, size)
        except OSError as error:
            raise SetupError(f"{source} cannot be copied to {target}: {error.strerror}") from error


def _copy_data(from_fd: int, to_fd: int, size: int) -> None:
    offset = 0
    while offset < size:
        try:
            start = os.lseek(from_fd, offset, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole up to the end
            break
        offset = os.lseek(from_fd, start, os.SEEK_HOLE)
        while start < offset:
            start += _copy_some(from_fd, to_fd, start, offset - start)


def _copy_some(from_fd: int, to_fd: int, offset: int, length: int) -> int:
    try:
        copied = os.copy_file_range(from_fd, to_fd, length, offset, offset)
    except OSError:
        copied = os.pwrite(to_fd, os.pread(from_fd, min(length, 1 << 20), offset), offset)
    if copied == 0:
        raise SetupError("an image became shorter while it was copied")
    return copied
