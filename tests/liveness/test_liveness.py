# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of requests against devices that are slow, blocked, raising or dying.

The sentences that hold whatever happens are in :mod:`tests.liveness.rig`. A sequence that breaks
one is printed with everything that was done, and how to carry it out once more.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.liveness.process import Nursery
from tests.liveness.run import PATIENCE, attempt
from tests.liveness.steps import DISKS, Sequence, Step, load, make_sequence
from tests.support.soak import SOAK, times

JOBS = 4
"""Sequences at once; they mostly wait."""
COUNT = times(25, 500)
"""Sequences of each part."""


def carry_out(nursery: Nursery, sequences: Iterable[Sequence]) -> None:
    with ThreadPoolExecutor(JOBS) as pool:
        outcomes = pool.map(lambda sequence: attempt(nursery, sequence), sequences)
        reports = [outcome.report() for outcome in outcomes if outcome.finding]
    assert not reports, "\n\n".join(reports[:3])


@pytest.mark.parametrize("part", range(times(4, 12)))
def test_sequences(nursery: Nursery, part: int) -> None:
    """The same ones each time; with the soak tests, ones that nobody has tried."""
    first = random.SystemRandom().randrange(1 << 31) if SOAK else part * COUNT
    print(f"part {part}: seeds {first} to {first + COUNT - 1}")
    carry_out(nursery, (make_sequence(first + number, PATIENCE) for number in range(COUNT)))


def test_disks(nursery: Nursery) -> None:
    """SCSI controllers on disks that are slow, or stand still."""
    first = random.SystemRandom().randrange(1 << 31) if SOAK else 0
    print(f"seeds {first} to {first + COUNT - 1}")
    carry_out(nursery, (make_sequence(first + number, PATIENCE, DISKS) for number in range(COUNT)))


# ---- the harness notices ----------------------------------------------------------------

CONNECT = Step(
    "connect", {"back": "good", "code_map": "", "inflight": False, "table": False, "resume": False}
)


def opened(channel: int, programs: str = "") -> Step:
    return Step("open", {"channel": channel, "ring": [3, 3], "programs": programs})


def packet(words: str) -> Step:
    return Step("packet", {"channel": 0, "words": words, "count": 1, "pages": 1})


@pytest.mark.parametrize(
    ("mistake", "sentence", "steps"),
    [
        ("late", "answered", [opened(0), Step("close", {"channel": 0})]),
        ("loose", "still", [opened(0), packet("spawn block write"), Step("close", {"channel": 0})]),
        ("frail", "contained", [opened(0), Step("modify", {"channel": 0, "vp": 1})]),
        ("deaf", "contained", [opened(0), opened(1), Step("close", {"channel": 0}), Step("probe")]),
        ("leaky", "flat", [opened(0)]),
        ("busy", "flat", [opened(0)]),
    ],
)  # fmt: skip
def test_a_back_end_with_a_mistake(
    nursery: Nursery, mistake: str, sentence: str, steps: list[Step]
) -> None:
    patience = 0.02 if mistake == "late" else 0.1
    config = {
        "device": "plain",
        "unplug": [],
        "patience": patience,
        "mistake": mistake,
        "settle": 0.1,
    }
    outcome = attempt(nursery, Sequence(0, config, [CONNECT, *steps]))
    assert outcome.finding is not None
    assert outcome.finding.sentence == sentence, outcome.report()


def test_a_sequence_is_the_same_for_the_same_seed_and_as_text() -> None:
    sequence = make_sequence(7, PATIENCE)
    assert make_sequence(7, PATIENCE) == sequence == load(sequence.dump())
    assert make_sequence(8, PATIENCE).steps != sequence.steps
