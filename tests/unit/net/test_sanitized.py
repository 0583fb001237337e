# SPDX-License-Identifier: GPL-2.0-or-later
"""The network card's data path in C, built with sanitizers, and run: the fuzzing corpus, and all
its threads at once. docs/engine.md has the commands.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sanitized import ADDRESS, FUZZ, THREAD, build, run
from tests.support.soak import times

CORPUS = FUZZ / "corpus" / "net"


def test_the_corpus_replays(tmp_path: Path) -> None:
    inputs = sorted(CORPUS.iterdir())
    assert len(inputs) > 50
    status, output, complaints = run(build(tmp_path, "net_fuzz", "-DREPLAY"), *inputs)
    assert (status, output) == (0, f"{len(inputs)} inputs\n"), complaints


def test_the_seeds_are_in_the_corpus(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FUZZ / "make_net_corpus.py", tmp_path], check=True)
    for seed in tmp_path.iterdir():
        assert (CORPUS / seed.name).read_bytes() == seed.read_bytes()


@pytest.mark.parametrize("sanitizer", [ADDRESS, THREAD], ids=["address", "thread"])
def test_all_threads_at_once(tmp_path: Path, sanitizer: list[str]) -> None:
    program = build(tmp_path, "net_race", sanitizer=sanitizer)
    status, output, complaints = run(program, f"{times(500, 15_000)}")
    assert (status, output) == (0, "ok\n"), complaints
