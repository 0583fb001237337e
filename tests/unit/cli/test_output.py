# SPDX-License-Identifier: GPL-2.0-or-later
"""Output of a command that cannot be written, and errors as a user sees them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import EXAMPLES
from vhostvmbus.cli import main
from vhostvmbus.cli.words import in_words


@pytest.fixture
def _handlers() -> Iterator[None]:
    """The command's handlers of signals go again."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_output_that_does_not_fit_is_an_error_in_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device = f"{EXAMPLES / 'pfn_digest.py'}:PfnDigest"
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["try", device, "--count", "1", "--pages", "1"]) == 1
    assert "vhostvmbus try: No space left on device\n" in capsys.readouterr().err


@pytest.mark.usefixtures("_handlers")
def test_a_cache_that_cannot_be_made_is_a_failure_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    words = ["vm", "--qemu", "/bin/true", "--kernel", "/k", "--initramfs", "/i", "--no-root"]
    assert main([*words, "--accel", "tcg", "--net", "none", "--cmd", "true"]) == 125
    said = capsys.readouterr().err
    assert f"vhostvmbus vm: {tmp_path / 'file'}/vhostvmbus: Not a directory\n" in said


def test_an_error_names_its_files_and_has_no_number() -> None:
    assert in_words(FileNotFoundError(2, "No such file or directory", "/a")) == (
        "/a: No such file or directory"
    )
    assert in_words(OSError(18, "Invalid cross-device link", "/a", None, "/b")) == (
        "/a and /b: Invalid cross-device link"
    )
    assert in_words(OSError("words")) == in_words(ValueError("words")) == "words"
