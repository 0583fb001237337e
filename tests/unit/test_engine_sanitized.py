# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's C files, built with AddressSanitizer and UndefinedBehaviorSanitizer, and run.

docs/engine.md has the commands; the same sources make the extension module.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "vhostvmbus" / "ring"
FUZZ = ROOT / "tests" / "fuzz"
SOURCES = sorted(ENGINE.glob("*.c"))
FLAGS = [
    "-std=gnu11",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
    f"-I{ENGINE}",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=1"}


def build(tmp_path: Path, name: str, *flags: str) -> Path:
    program = tmp_path / name
    compiler = os.environ.get("CC", "cc")
    subprocess.run(
        [compiler, *FLAGS, *flags, "-o", program, FUZZ / f"{name}.c", *SOURCES], check=True
    )
    return program


def test_the_engine_check_passes(tmp_path: Path) -> None:
    result = subprocess.run(
        [build(tmp_path, "engine_check")], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


def test_a_host_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    """At each step of the record, and 300 times at any moment (with the soak tests, 5000 times)."""
    times = "5000" if os.environ.get("VHOSTVMBUS_SOAK") == "1" else "300"
    result = subprocess.run(
        [build(tmp_path, "inflight_check", "-DVVB_STEPS"), times],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1"},
    )
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stderr


def test_the_corpus_replays(tmp_path: Path) -> None:
    inputs = sorted((FUZZ / "corpus" / "engine").iterdir())
    assert len(inputs) > 25
    program = build(tmp_path, "engine_fuzz", "-DREPLAY")
    result = subprocess.run([program, *inputs], capture_output=True, text=True, env=ENVIRONMENT)
    assert (result.returncode, result.stdout) == (0, f"{len(inputs)} inputs\n"), result.stderr


def test_the_seeds_are_in_the_corpus(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FUZZ / "make_corpus.py", tmp_path], check=True)
    for seed in tmp_path.iterdir():
        assert (FUZZ / "corpus" / "engine" / seed.name).read_bytes() == seed.read_bytes()


def test_the_sanitizers_are_on(tmp_path: Path) -> None:
    """Would they notice? A program that reads behind its buffer has to fail."""
    source = tmp_path / "bad.c"
    source.write_text(
        "#include <stdlib.h>\nint main(int argc, char **argv) { (void)argv;"
        " char *p = malloc(8); p[0] = 1; return p[argc + 8]; }\n"
    )
    program = tmp_path / "bad"
    subprocess.run([os.environ.get("CC", "cc"), *FLAGS, "-o", program, source], check=True)
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([program], check=True, capture_output=True, env=ENVIRONMENT)
