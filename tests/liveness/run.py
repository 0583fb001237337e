# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries a sequence out in a folder of its own, and makes one that found something shorter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.liveness.play import play
from tests.liveness.process import Nursery, scratch
from tests.liveness.rig import Finding, Late
from tests.liveness.steps import DISKS, Sequence

PATIENCE = 0.25
"""By what the back end's patience, and so the time for its answers, is multiplied."""
LATE = 3
"""How often a sequence has to be late, time after time, before it is not the machine that is."""
LOG_LINES = 80
"""Lines of the back end's log that a report has."""


@dataclass
class Outcome:
    """A sequence that was carried out: ``finding`` is ``None`` if all sentences held."""

    sequence: Sequence
    finding: Finding | None
    story: list[str]
    log: str

    def report(self) -> str:
        """Returns what was found, with everything that was done before it."""
        lines = self.log.splitlines()
        return "\n".join(
            [
                f"seed {self.sequence.seed}: {self.finding}",
                f"{self.sequence.config}",
                *self.story,
                f"the end of the back end's log ({len(lines)} lines):",
                *(f"    {line}" for line in lines[-LOG_LINES:]),
                f"seed {self.sequence.seed}: {self.finding}",
                "once more: python -m tests.liveness"
                f" --seed {self.sequence.seed} --patience {self.sequence.config['patience']}"
                + (" --disks" if self.sequence.config["device"] in DISKS else ""),
            ]
        )


def attempt(nursery: Nursery, sequence: Sequence) -> Outcome:
    """Carries a sequence out; several times, if something is late, and counts the last one."""
    for _ in range(LATE):
        outcome = _attempt(nursery, sequence)
        if not isinstance(outcome.finding, Late):
            break
    return outcome


def _attempt(nursery: Nursery, sequence: Sequence) -> Outcome:
    with scratch() as name:
        folder = Path(name)
        finding, story = play(nursery, folder, sequence)
        log = folder / "log.txt"
        return Outcome(sequence, finding, story, log.read_text(errors="replace"))


def shrink(nursery: Nursery, outcome: Outcome, attempts: int) -> Outcome:
    """Returns the shortest sequence that breaks the same sentence, after so many attempts."""
    best = outcome
    assert best.finding is not None
    size = len(best.sequence.steps) // 2
    while size:
        at = 0
        while at < len(best.sequence.steps) and attempts:
            steps = best.sequence.steps
            attempts -= 1
            shorter = attempt(nursery, best.sequence.with_steps(steps[:at] + steps[at + size :]))
            if shorter.finding and shorter.finding.sentence == outcome.finding.sentence:  # type: ignore[union-attr]
                best = shorter
            else:
                at += size
        size //= 2
    return best
