# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds C programs of ``tests/fuzz`` with the engine's files and a sanitizer: docs/engine.md."""

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.support.paths import FUZZ, TREE

ENGINE = TREE / "vhostvmbus" / "engine"
NET = TREE / "vhostvmbus" / "devices" / "net" / "native"
COMPILER = os.environ.get("CC", "cc")
FLAGS = [
    "-std=gnu11",
    "-O1",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
    f"-I{ENGINE}",
    f"-I{NET}",
    "-fno-sanitize-recover=all",
]
ADDRESS = ["-fsanitize=address,undefined"]
THREAD = ["-fsanitize=thread", "-Wno-unknown-warning-option", "-Wno-tsan"]
"""The flags for races. The sanitizer does not know fences, which gcc warns of: everything that they
order is atomic.
"""
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


NO_LEAKS = "detect_leaks=0:abort_on_error=1"
"""The options for processes that are killed: they leave what they had."""


def build(
    tmp_path: Path,
    name: str,
    *flags: str,
    sanitizer: Sequence[str] = ADDRESS,
    engine_flags: Sequence[str] = (),
) -> Path:
    """Builds the program, with the engine and the network card's data path.

    ``flags`` are for the program's own file, ``engine_flags`` for the engine as well, which is
    built without the card then.
    """
    program = tmp_path / name
    common = [*FLAGS, *sanitizer, *engine_flags]
    folders = [ENGINE] if engine_flags else [ENGINE, NET]
    command = [COMPILER, *common, *flags, "-o", program, FUZZ / f"{name}.c"]
    subprocess.run([*command, _library(tmp_path, common, folders)], check=True)
    return program


def _library(tmp_path: Path, flags: Sequence[str], folders: Sequence[Path]) -> Path:
    """Returns the C of these folders as an archive, built by whoever wants it first in a run."""
    # With pytest-xdist each process has a folder of its own in the run's.
    run_folder = tmp_path.parents["PYTEST_XDIST_WORKER" in os.environ]
    name = hashlib.sha256(repr(flags).encode()).hexdigest()[:16]
    folder = run_folder / f"sanitized-{name}"
    folder.mkdir(exist_ok=True)
    archive = folder / "engine.a"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not archive.exists():
            files = sorted(path for each in folders for path in each.glob("*.c"))
            subprocess.run([COMPILER, *flags, "-c", *files], cwd=folder, check=True)
            objects = [f"{path.stem}.o" for path in files]
            subprocess.run(["ar", "rcs", "unfinished.a", *objects], cwd=folder, check=True)
            (folder / "unfinished.a").rename(archive)
    return archive


def run(program: Path, *arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    """Returns ``(exit status, what it printed, what it complained of)``."""
    command: Sequence[str | Path] = [program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment)
    return result.returncode, result.stdout, result.stderr
