# SPDX-License-Identifier: GPL-2.0-or-later
"""The compiled module is built to give a mistake in it little to work with: read from its file."""

from __future__ import annotations

import re
import subprocess

import pytest

from vhostvmbus import _engine


def readelf(option: str) -> str:
    """What readelf says of the module."""
    words = ["readelf", option, "--wide", _engine.__file__]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def test_what_the_linker_resolves_is_resolved_at_start_and_read_only_then() -> None:
    dynamic = readelf("--dynamic")
    assert "BIND_NOW" in dynamic
    assert "NOW" in next(line for line in dynamic.splitlines() if "FLAGS_1" in line)
    headers = readelf("--program-headers").splitlines()
    assert any("GNU_RELRO" in line for line in headers)
    (stack,) = [line for line in headers if "GNU_STACK" in line]
    assert " RW " in stack


@pytest.mark.parametrize("name", ["__stack_chk_fail", r"__(?!stack)\w+_chk"])
def test_the_stack_and_copies_are_checked(name: str) -> None:
    assert re.search(rf"UND {name}\b", readelf("--dyn-syms"))
