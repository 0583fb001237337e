# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``--times`` says of a run."""

from dataclasses import dataclass

from tests.support.durations import SLOWEST, table


@dataclass
class Phase:
    nodeid: str
    when: str
    duration: float


def test_phases_are_added_up_for_each_test_and_each_folder() -> None:
    one, two = "tests/vm/net/test_life.py::test_one[6.1]", "tests/vm/net/test_card.py::test_two"
    other = "tests/unit/ring/test_ring.py::test_other"
    assert table(
        [
            Phase(other, "call", 0.25),
            Phase(one, "setup", 20.0),
            Phase(one, "call", 5.5),
            Phase(one, "teardown", 1.0),
            Phase(two, "call", 30.0),
        ]
    ) == [
        "the slowest 3:",
        "   30.0 s vm/net/test_card.py::test_two",
        "   26.5 s vm/net/test_life.py::test_one[6.1] (20 s to set up)",
        "    0.2 s unit/ring/test_ring.py::test_other",
        "each folder:",
        "unit/ring                    0 s in 1 tests",
        "vm/net                      56 s in 2 tests",
    ]


def test_only_the_slowest_are_named() -> None:
    lines = table(Phase(f"tests/a/test_a.py::test[{n}]", "call", n) for n in range(100))
    assert lines[0] == f"the slowest {SLOWEST}:"
    assert lines[1] == "   99.0 s a/test_a.py::test[99]"
    assert lines[SLOWEST] == f"   {100 - SLOWEST:.1f} s a/test_a.py::test[{100 - SLOWEST}]"
    assert lines[SLOWEST + 1 :] == ["each folder:", "a                         4950 s in 100 tests"]
