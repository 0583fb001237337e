# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's half for devices of one's own: the kernel module, its tool, its Python binding.

Built against the distribution's kernel headers, which are unpacked in the cache and used where
they lie; nothing is installed. Headers carry programs that run on this machine (modpost,
objtool), built by the distribution for the suite that the headers are from.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

from .apt import PrivateApt
from .cache import cache_root, content_key, locked, work_folder
from .progress import BuildError, Step

MODULE = "vmbus_user"


def _compiler() -> str:
    """The compiler that Debian 12 built its kernels with, or else this machine's."""
    return shutil.which("gcc-12") or shutil.which("gcc") or "cc"


def _compiler_version() -> str:
    try:
        words = [_compiler(), "--version"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError("no C compiler; install build-essential") from error


def header_packages(apt: PrivateApt, release: str) -> list[str]:
    """The packages that building a module for kernel *release* takes."""
    main = f"linux-headers-{release}"
    names = re.findall(r"[a-z0-9][a-z0-9.+-]+", apt.field(main, "Depends"))
    needed = [n for n in names if re.match(r"linux-headers-.*-common$|linux-kbuild-", n)]
    if len(set(needed)) != 2:
        raise BuildError(f"{main} depends on other packages than expected: {' '.join(names)}")
    return [main, *dict.fromkeys(needed)]


def headers(series: str, suite: str, release: str) -> Path:
    """The folder to give to ``make -C``: the headers of kernel *release*, unpacked."""
    room = cache_root() / "images" / f"headers-{series}"
    result = room / content_key([Path(__file__), release])
    folder = result / "usr" / "src" / f"linux-headers-{release}"
    if result.is_dir():
        return folder
    with locked(f"headers-{series}"), work_folder(room) as work:
        if result.is_dir():
            return folder
        with Step(f"headers-{series}", f"headers of kernel {series}: fetch and unpack", 20) as step:
            apt = PrivateApt(suite, (suite,))
            apt.update(step)
            made = work / "made"
            for name in header_packages(apt, release):
                package = apt.download(step, name, work)
                step.run(["dpkg-deb", "-x", package, made])
                package.unlink()
            makefile = made / "usr" / "src" / f"linux-headers-{release}" / "Makefile"
            # It names the common part by the path that it would be installed at.
            text = makefile.read_text().replace("include /usr/src/", f"include {result}/usr/src/")
            makefile.write_text(text)
            made.rename(result)
    return folder


def build(sources: Path, series: str, suite: str, release: str) -> Path:
    """A folder with the module, the tool (static), the Python binding and the C header."""
    room = cache_root() / "images" / f"module-{series}"
    result = room / content_key([Path(__file__), sources, release, _compiler_version()])
    if result.is_dir():
        return result
    folder = headers(series, suite, release)
    with locked(f"module-{series}"), work_folder(room) as work:
        if result.is_dir():
            return result
        with Step(f"module-{series}", f"module for kernel {series}: build", 10) as step:
            module, made = work / MODULE, work / "made"
            shutil.copytree(sources / MODULE, module)
            made.mkdir()
            # No vmlinux is at hand to derive type information from.
            words = [f"M={module}", f"CC={_compiler()}", "CONFIG_DEBUG_INFO_BTF_MODULES="]
            env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
            step.run(["make", "-C", folder, *words, "modules"], env=env)
            step.run(["strip", "--strip-debug", module / f"{MODULE}.ko"])
            shutil.copy(module / f"{MODULE}.ko", made)
            shutil.copy(module / f"{MODULE}.h", made)
            shutil.copy(sources / "tools" / f"{MODULE}.py", made)
            tool = sources / "tools" / "vmbus-user.c"
            flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-static", f"-I{module}"]
            step.run([_compiler(), *flags, "-o", made / "vmbus-user", tool])
            made.rename(result)
    return result
