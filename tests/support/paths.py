# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the tree's parts are, for tests that read them or run programs of them."""

from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
EXAMPLES = TREE / "examples"
FUZZ = TREE / "tests" / "fuzz"
PROGRAMS = TREE / "tests" / "vm" / "programs"
"""What runs in a guest, or serves one in a way that only a test wants."""
