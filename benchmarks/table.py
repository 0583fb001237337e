# SPDX-License-Identifier: GPL-2.0-or-later
"""A table of figures, and the description of the machine that they are from."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

Cell = str | int | float


@dataclass
class Table:
    """A table with a title, column names and rows; ``notes`` are printed below."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: Cell) -> None:
        """Adds another row; a figure is rounded to what is worth reading."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for {len(self.columns)} columns")
        self.rows.append(cells)

    def __str__(self) -> str:
        """Returns text in columns; figures are aligned to the right."""
        body = [[_shown(cell) for cell in row] for row in self.rows]
        widths = [
            max(len(line[column]) for line in [list(self.columns), *body])
            for column in range(len(self.columns))
        ]
        right = [
            bool(self.rows) and all(not isinstance(row[column], str) for row in self.rows)
            for column in range(len(self.columns))
        ]

        def line(cells: Sequence[str]) -> str:
            return "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(cells, widths, right, strict=True)
            ).rstrip()

        rule = "  ".join("-" * width for width in widths)
        lines = [self.title, line(self.columns), rule, *map(line, body)]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _shown(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or abs(cell) >= 1000:
        return f"{cell:,.0f}".replace(",", " ")
    return f"{cell:.3g}" if abs(cell) < 100 else f"{cell:.0f}"


def machine() -> str:
    """Returns what the figures depend on: processor, cores, kernel, Python."""
    model, virtual = "unknown processor", False
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() == "flags":
            virtual = "hypervisor" in value.split()
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    where = "a virtual machine" if virtual else "bare metal"
    return (
        f"{model}, {cores} cores, {memory:.0f} GiB, {where}; Linux {platform.release()}; "
        f"Python {platform.python_version()}"
    )


@dataclass(frozen=True)
class HostTime:
    """Seconds of this machine's processors, all added up; the difference of two is of a span."""

    elapsed: float
    """The clock's seconds."""
    everything: float
    busy: float

    @classmethod
    def now(cls) -> HostTime:
        """Returns the times since some moment in the past."""
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ticks = [int(one) / os.sysconf("SC_CLK_TCK") for one in fields]
        idle = ticks[3] + ticks[4]
        return cls(time.monotonic(), sum(ticks), sum(ticks) - idle)

    def __sub__(self, other: HostTime) -> HostTime:
        return HostTime(
            self.elapsed - other.elapsed,
            self.everything - other.everything,
            self.busy - other.busy,
        )


class Bystanders:
    """The use that other processes make of this machine's processors, from when this is made."""

    def __init__(self) -> None:
        self._start = HostTime.now()
        self._ours = sum(os.times()[:4])

    @property
    def share(self) -> float:
        """The others' part of the processors' time; our children count once they have ended."""
        span = HostTime.now() - self._start
        ours = sum(os.times()[:4]) - self._ours
        return max(0.0, span.busy - ours) / span.everything if span.everything else 0.0
