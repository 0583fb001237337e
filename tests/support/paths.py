# SPDX-License-Identifier: GPL-2.0-or-later
"""The places of the tree's parts, for tests that read them or run programs of them."""

from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
EXAMPLES = TREE / "examples"
FUZZ = TREE / "tests" / "fuzz"
PROGRAMS = TREE / "tests" / "vm" / "programs"
"""The programs that run in a guest, or serve one in a way that only a test wants."""
