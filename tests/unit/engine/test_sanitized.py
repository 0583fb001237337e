# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's C files, built with AddressSanitizer and UndefinedBehaviorSanitizer, and run.

docs/engine.md has the commands; the same sources make the extension module.
"""

import subprocess
import sys
from pathlib import Path

from tests.support.sanitized import ADDRESS, COMPILER, FLAGS, FUZZ, NO_LEAKS, THREAD, build, run
from tests.support.soak import times


def test_the_engine_check_passes(tmp_path: Path) -> None:
    status, output, complaints = run(build(tmp_path, "engine_check"))
    assert (status, output) == (0, "ok\n"), complaints


def test_a_host_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    """At each step of the record, and 50 times at any moment (with the soak tests, 5000 times)."""
    program = build(tmp_path, "inflight_check", engine_flags=["-DVVB_STEPS"])
    status, output, complaints = run(program, f"{times(50, 5000)}", ASAN_OPTIONS=NO_LEAKS)
    assert (status, output) == (0, "ok\n"), complaints


def test_the_corpus_replays(tmp_path: Path) -> None:
    inputs = sorted((FUZZ / "corpus" / "engine").iterdir())
    assert len(inputs) > 25
    status, output, complaints = run(build(tmp_path, "engine_fuzz", "-DREPLAY"), *inputs)
    assert (status, output) == (0, f"{len(inputs)} inputs\n"), complaints


def test_the_seeds_are_in_the_corpus(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FUZZ / "make_corpus.py", tmp_path], check=True)
    for seed in tmp_path.iterdir():
        assert (FUZZ / "corpus" / "engine" / seed.name).read_bytes() == seed.read_bytes()


def test_the_sanitizers_are_on(tmp_path: Path) -> None:
    """Would they notice? A program that reads behind its buffer has to fail."""
    assert fails(
        tmp_path,
        ADDRESS,
        "#include <stdlib.h>\nint main(int argc, char **argv) { (void)argv;"
        " char *p = malloc(8); p[0] = 1; return p[argc + 8]; }\n",
    )


def test_the_thread_sanitizer_is_on(tmp_path: Path) -> None:
    """... and one whose threads write the same word."""
    assert fails(
        tmp_path,
        THREAD,
        "#include <pthread.h>\nstatic int word;\n"
        "static void *more(void *p) { for (int i = 0; i < 9999; i++) word++; return p; }\n"
        "int main(void) { pthread_t t; pthread_create(&t, NULL, more, NULL); more(NULL);"
        " pthread_join(t, NULL); return word < 0; }\n",
    )


def fails(tmp_path: Path, sanitizer: list[str], text: str) -> bool:
    source, program = tmp_path / "bad.c", tmp_path / "bad"
    source.write_text(text)
    subprocess.run([COMPILER, *FLAGS, *sanitizer, "-o", program, source], check=True)
    return run(program)[0] != 0
