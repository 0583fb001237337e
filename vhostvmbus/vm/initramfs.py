# SPDX-License-Identifier: GPL-2.0-or-later
"""The first root file system of a guest: busybox, a kernel's modules, the scripts that boot.

What goes in is said in ``guest-images/initramfs``: ``modules`` (names; what they depend on comes
along), ``init`` and the scripts that the booted system goes on to use. Built for any kernel whose
``lib/modules/<version>`` folder is at hand, so a user's own kernel boots like ours. Modules are
stored uncompressed: unpacking them under dynamic translation costs more than their size.
"""

import lzma
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vhostvmbus.vm.cpio import CpioArchive
from vhostvmbus.vm.errors import SetupError

SCRIPTS = ("boot", "agent", "console", "network", "shutdown")
INDEXES = ("modules.order", "modules.builtin", "modules.builtin.modinfo")
SUFFIX = re.compile(r"\.ko(\.xz|\.zst|\.gz)?$")


def module_name(path: str) -> str:
    """Returns the name that a module goes by, from its file's path."""
    return SUFFIX.sub("", path.rpartition("/")[2]).replace("-", "_")


def wanted_modules(recipe: Path) -> list[str]:
    """Returns the names in the recipe's list of modules."""
    lines = (recipe / "modules").read_text().splitlines()
    return [word for line in lines for word in line.split("#", 1)[0].split()]


def closure(dependencies: str, wanted: list[str]) -> list[str]:
    """Returns the paths of the ``wanted`` modules and of all that they need.

    ``dependencies`` is the text of ``modules.dep``, whose lines name a module and everything that
    must be loaded before it. A wanted module that is not there is left out.
    """
    needs: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in dependencies.splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
        by_name[module_name(path)] = path
    chosen: dict[str, None] = {}
    for name in wanted:
        path = by_name.get(name.replace("-", "_"), "")
        if path:
            chosen.update(dict.fromkeys([*needs[path], path]))
    return sorted(chosen)


def unpacked(path: Path) -> bytes:
    """Returns a module's bytes, decompressed."""
    data = path.read_bytes()
    if path.suffix == ".ko":
        return data
    if path.suffix == ".xz":
        return lzma.decompress(data)
    program = {".zst": "zstd", ".gz": "gzip"}[path.suffix]
    return subprocess.run([program, "-dc"], input=data, capture_output=True, check=True).stdout


def sbin_tool(name: str) -> str:
    """Returns the path of an administrator's program, for a user whose PATH does not have it."""
    for folder in ("", "/usr/sbin/", "/sbin/"):
        if path := shutil.which(folder + name):
            return path
    raise SetupError(f"the program {name} is not installed")


def build_initramfs(
    recipe: Path, inittab: Path, busybox: Path, modules: Path, extras: Sequence[Path] = ()
) -> bytes:
    """Builds an initramfs for the kernel with ``modules``, a ``lib/modules/<version>``.

    ``extras`` are the project's own: kernel modules (``.ko``), and tools, which the guest has in
    its PATH and PYTHONPATH. Raises SetupError if the folder is not one.
    """
    release = modules.name
    archive = CpioArchive()
    archive.add_folder("/dev")
    archive.add_device("/dev/console", 0o600, 5, 1)
    archive.add_file("/bin/busybox", busybox.read_bytes(), 0o755)
    archive.add_file("/init", (recipe / "init").read_bytes(), 0o755)
    archive.add_file("/etc/inittab", inittab.read_bytes())
    for name in SCRIPTS:
        archive.add_file(f"/guest/{name}", (recipe / name).read_bytes(), 0o755)
    with tempfile.TemporaryDirectory(prefix="vhostvmbus-") as temporary:
        tree = Path(temporary) / "lib" / "modules" / release
        tree.mkdir(parents=True)
        if not (modules / "modules.dep").is_file():
            raise SetupError(f"{modules} has no modules.dep; it is not a lib/modules/<version>")
        for index in INDEXES:
            if (modules / index).is_file():
                shutil.copy(modules / index, tree / index)
        dependencies = (modules / "modules.dep").read_text()
        for path in closure(dependencies, wanted_modules(recipe)):
            target = tree / SUFFIX.sub(".ko", path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(unpacked(modules / path))
        for extra in extras:
            if extra.suffix == ".ko":
                (tree / "updates").mkdir(exist_ok=True)
                shutil.copy(extra, tree / "updates")
            else:
                archive.add_tree(f"/guest/tools/{extra.name}", extra)
        done = subprocess.run(
            [sbin_tool("depmod"), "-b", temporary, release], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SetupError(f"depmod failed for {modules}: {done.stderr.strip()}")
        archive.add_tree(f"/lib/modules/{release}", tree)
    return archive.finish()
