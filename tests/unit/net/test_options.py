# SPDX-License-Identifier: GPL-2.0-or-later
"""From what a user asks for to the back ends: ``make run-vm NET=``, ``vm --net``, ``serve net``."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.network import (
    namespace_name,
    namespaces,
    private_network,
    require_root,
    wait_for,
)
from tests.support.paths import TREE
from vhostvmbus.cli import make_parser
from vhostvmbus.cli.vm import networks
from vhostvmbus.devices.net.link.spec import parse
from vhostvmbus.vm.errors import SetupError
from vhostvmbus.vm.machine import with_address

SERVE = (sys.executable, "-m", "vhostvmbus", "serve")


def chosen(*words: str) -> list[str]:
    return networks(make_parser().parse_args(["vm", *words]))


@pytest.fixture
def passt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place where passt is, or is not."""
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "passt"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program


def test_the_default_is_user_mode_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen() == ["user"]  # asks the real passt
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chosen() == []
    assert "apt install passt" in capsys.readouterr().err
    assert chosen("--net", "user") == ["user"]  # and then it is an error


def test_a_passt_that_may_not_run(passt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a chroot, say, it may not make the namespace that it locks itself into."""
    passt.write_text("#!/bin/sh\necho 'no user namespace: not permitted' >&2\nexit 1\n")
    assert chosen() == []
    assert "no user namespace: not permitted" in capsys.readouterr().err


@pytest.mark.usefixtures("passt")
def test_what_is_asked_for() -> None:
    assert chosen("--net", "none") == []
    assert chosen("--net", "tap", "--net", "user,mtu=1400") == ["tap", "user,mtu=1400"]
    assert chosen("--net", "none", "--net", "tap") == ["tap"]
    with pytest.raises(SetupError, match="network lan: there are user"):
        chosen("--net", "lan")


@pytest.mark.usefixtures("passt")
def test_a_machine_in_a_machine_has_none() -> None:
    assert chosen("--accel", "nested") == []
    assert chosen("--accel", "nested", "--net", "none") == []
    with pytest.raises(SetupError, match="nested"):
        chosen("--accel", "nested", "--net", "user")


def test_every_card_has_an_address_of_its_own() -> None:
    links = [with_address("user") for _ in range(10)]
    addresses = {parse(link).mac for link in links}
    assert len(addresses) == 10
    assert all(address and address[:3] == b"\x52\x54\x00" for address in addresses)
    assert with_address("tap,mac=52:54:00:00:00:01") == "tap,mac=52:54:00:00:00:01"


def test_what_make_passes_on(tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    words = ["6.1", "", "2", "1G", "auto", "", "300"]
    done = subprocess.run(
        [TREE / "tools" / "run-vm", program, *words],
        env={**os.environ, "RUN_VM_NET": "user,hostfwd=tcp:1:2 tap"},
        capture_output=True,
        text=True,
        check=True,
    )
    passed = done.stdout.splitlines()
    assert [passed[i + 1] for i, word in enumerate(passed) if word == "--net"] == [
        "user,hostfwd=tcp:1:2",
        "tap",
    ]


@pytest.mark.parametrize(
    ("link", "status", "words"),
    [
        ("lan", 2, "network lan: there are user"),
        ("tap:nothere", 1, "there is no interface nothere"),
        ("none,pcap=/dev/null", 1, "pcap=/dev/null: not a file"),
    ],
)
def test_a_link_that_cannot_be(link: str, status: int, words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [*SERVE, "net", "--link", link, "--socket", tmp_path / "s"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_what_was_made_for_the_card_goes_with_it(end: signal.Signals, tmp_path: Path) -> None:
    require_root()
    name = namespace_name()
    with private_network():
        child = subprocess.Popen(
            [*SERVE, "net", "--link", f"netns:{name}", "--socket", tmp_path / "s"],
            stderr=subprocess.DEVNULL,
        )
        wait_for((tmp_path / "s").exists, "it listens", 30)
        assert name in namespaces()
        child.send_signal(end)
        assert child.wait(20) == 128 + end
    assert name not in namespaces()
