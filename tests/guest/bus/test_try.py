# SPDX-License-Identifier: GPL-2.0-or-later
"""``vhostvmbus try`` and the examples: each is run by the very command that its file documents."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import EXAMPLES, TREE
from vhostvmbus.cli import make_parser

PROGRAMS = sorted(EXAMPLES.glob("*.py"))


def documented_command(example: Path) -> list[str]:
    """The words of the command in the file's docstring."""
    found = re.search(r"^Try it: ``(vhostvmbus try .*)``$", example.read_text(), re.MULTILINE)
    assert found, f"{example} does not say how it is tried"
    return shlex.split(found[1])


def test_there_are_the_examples_that_the_documents_name() -> None:
    names = {path.stem for path in PROGRAMS}
    assert names >= {"echo", "pfn_digest", "pfn_fill", "host_push", "slow_and_out_of_order"}


@pytest.mark.parametrize("example", PROGRAMS, ids=lambda path: path.stem)
def test_an_example(example: Path) -> None:
    command = documented_command(example)
    assert command[2].startswith(f"examples/{example.name}:")
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=TREE, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified" in done.stdout
    assert "WRONG" not in done.stdout
    assert done.stderr == ""


def test_the_document_about_writing_a_device_is_true(tmp_path: Path) -> None:
    """Its device, its command with its output, and its test."""
    text = (TREE / "docs" / "writing-a-device.md").read_text()
    device, test = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "digest.py").write_text(device)
    (tmp_path / "test_digest.py").write_text(f"import hashlib\nfrom digest import Digest\n{test}")
    found = re.search(r"^\$ (vhostvmbus try .*)\n((?:.*\n)*?)```", text, re.MULTILINE)
    assert found
    command, shown = found.groups()
    for words in (shlex.split(command), ["pytest", "-q", "-p", "no:cacheprovider"]):
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if words[0] == "vhostvmbus":

            def timeless(output: str) -> str:
                return re.sub(r"after [0-9.]+ ms", "after a while", output)

            assert timeless(done.stdout) == timeless(shown)
        else:
            assert "1 passed" in done.stdout


@pytest.mark.parametrize("example", PROGRAMS, ids=lambda path: path.stem)
def test_an_example_is_short(example: Path) -> None:
    """About 20 lines: what a class has, its docstrings, imports and check() not counted."""
    text = example.read_text()
    body = text[text.index("\nclass ") : text.index("\ndef ")]
    code = [line for line in body.splitlines() if line.strip() and '"""' not in line]
    assert len(code) <= 20


HEAD = """
from uuid import UUID
from vhostvmbus.device import Device

class Own(Device):
    class_id = UUID("6c0cb9a5-5b1b-4c0f-9d0b-6fb8d2a0e4c2")
"""


def try_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, *words: str
) -> tuple[int, str, str]:
    path = tmp_path / "own.py"
    path.write_text(HEAD + body)
    options = make_parser().parse_args(["try", f"{path}:Own", *words])
    status = options.run(options)
    out, err = capsys.readouterr()
    return status, out, err


def test_without_a_check_nobody_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = try_own(tmp_path, capsys, "    pass\n", "--count", "2", "--pages", "1")
    assert status == 0
    assert out.count("completed\n") == 2
    assert "2 of 2 packets completed, in the order 0 1" in out
    assert "nobody judged" in out


def test_a_check_that_does_not_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "    pass\n\ndef check(exchange):\n    return exchange.number != 1\n"
    status, out, _ = try_own(tmp_path, capsys, body, "--count", "3")
    assert status == 1
    assert out.count("verified") == 2
    assert out.count("WRONG: check() does not agree") == 1


def test_a_device_that_never_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "    def packet_received(self, channel, packet):\n        pass\n"
    status, out, _ = try_own(tmp_path, capsys, body, "--count", "1", "--timeout", "0.1")
    assert status == 1
    assert "was not completed in 0.1 s" in out
    assert "0 of 1 packets completed" in out


def test_a_device_that_writes_beside_the_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A device cannot do that through the packet, so this one is handed the whole memory."""
    body = """
    def packet_received(self, channel, packet):
        memory = packet.external_data._memory
        for region in memory.regions:
            whole = memory.translate(region.guest_phys_addr, region.size)[0].view
            for page in range(0, region.size, 4096):
                if whole[page : page + 4096] == b"\\xa5" * 4096:
                    whole[page] = 0
        packet.complete()
"""
    status, out, _ = try_own(tmp_path, capsys, body, "--count", "1", "--pages", "2")
    assert status == 1
    assert "WRONG: a page beside the packet's own was touched" in out


def test_errors_of_the_channel_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = try_own(
        tmp_path, capsys, "    max_external_data = 4096\n", "--count", "2", "--pages", "2"
    )
    assert status == 1
    assert "errors of the channel: 2 x GpaRangeTooLong" in out


def test_a_device_that_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = """
    def opened(self, channel):
        from vhostvmbus.device import RefuseOpen
        from vhostvmbus.wire.ntstatus import NtStatus
        raise RefuseOpen(NtStatus.ACCESS_DENIED)
"""
    status, _, err = try_own(tmp_path, capsys, body)
    assert status == 1
    assert "the device refused" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["examples/none.py:None"], "no such file"),
        (["examples/echo.py:Nothing"], "has no Nothing"),
        (["examples/echo.py:UUID"], "is not a subclass"),
        (["examples/echo.py:Echo", "--pages", "-1"], "number of pages"),
        (["examples/echo.py:Echo", "--pages", "2000000"], "more memory"),
    ],
)
def test_what_cannot_be_tried(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(TREE)
    options = make_parser().parse_args(["try", *words])
    assert options.run(options) == 2
    assert message in capsys.readouterr().err
