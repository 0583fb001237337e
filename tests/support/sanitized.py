# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds C programs of ``tests/fuzz`` with the engine's files and a sanitizer: docs/engine.md."""

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
    "-g",
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


def sources(*folders: Path) -> list[Path]:
    """Returns the C files of folders."""
    return sorted(path for folder in folders for path in folder.glob("*.c"))


def build(
    tmp_path: Path,
    name: str,
    *flags: str,
    sanitizer: Sequence[str] = ADDRESS,
    net: bool = False,
) -> Path:
    """Builds the program, with the engine; with the network card's data path too if ``net``."""
    program = tmp_path / name
    files = sources(ENGINE, NET) if net else sources(ENGINE)
    command = [COMPILER, *FLAGS, *sanitizer, *flags, "-o", program, FUZZ / f"{name}.c", *files]
    subprocess.run(command, check=True)
    return program


def run(program: Path, *arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    """Returns ``(exit status, what it printed, what it complained of)``."""
    command: Sequence[str | Path] = [program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | environment)
    return result.returncode, result.stdout, result.stderr
