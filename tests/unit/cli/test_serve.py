# SPDX-License-Identifier: GPL-2.0-or-later
"""``vhostvmbus serve`` as a process, at its edges: descriptors, folders, permissions."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID, uuid5

import pytest

from tests.support.paths import EXAMPLES
from tests.support.waiting import eventually
from vhostvmbus.cli import activation, make_parser
from vhostvmbus.cli.activation import ActivationError, handed_over
from vhostvmbus.cli.serve import _device_parser
from vhostvmbus.devices.net import NetworkCard
from vhostvmbus.devices.scsi import ScsiController
from vhostvmbus.guest import SoftwareGuest
from vhostvmbus.observe.statistics import read_statistics

SERVE = (sys.executable, "-m", "vhostvmbus", "serve")
DEVICE = f"{EXAMPLES / 'pfn_digest.py'}:PfnDigest"
NOBODY = 65534


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextlib.contextmanager
def serving(
    words: Sequence[str | Path], path: Path, **keywords: object
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a program that serves at ``path``, until it is asked to end, which it has to do."""
    process = subprocess.Popen(words, **keywords)  # type: ignore[call-overload]
    try:
        eventually(lambda: listens(path) or process.poll() is not None)
        yield process
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.terminate()  # not killed: a namespace of its own would stay
        process.wait(60)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.sock"


def test_nothing_becomes_a_standard_descriptor(path: Path, tmp_path: Path) -> None:
    words = [*SERVE, "scsi", f"{tmp_path / 'new.raw'}:1M", "--socket", str(path)]
    with serving(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], path) as process:
        for fd in range(3):
            assert os.readlink(f"/proc/{process.pid}/fd/{fd}") == os.devnull


def test_neither_the_umask_nor_a_full_disk_behind_stderr_matters(
    path: Path, tmp_path: Path
) -> None:
    image = tmp_path / "new.raw"
    words = [*SERVE, "scsi", f"{image}:1M", "--socket", path]
    words += ["--socket-mode", "660", "--socket-group", str(NOBODY), "--sandbox=off"]
    with (
        open("/dev/full", "wb") as full,
        serving(words, path, umask=0, stderr=full) as process,
        SoftwareGuest.connect(path),
    ):
        assert "NoNewPrivs:\t0" in Path(f"/proc/{process.pid}/status").read_text()
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, NOBODY)
        assert stat.S_IMODE(image.stat().st_mode) == 0o600
        assert read_statistics(path)["sandbox"] == {}


def test_a_socket_that_is_handed_over(path: Path) -> None:
    """As systemd does it: descriptor 3, and the process's own number in the environment."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        script = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{listener.fileno()}'
        words = ["bash", "-c", script, "bash", *SERVE, DEVICE]
        with (
            serving(words, path, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL),
            SoftwareGuest.connect(path) as guest,
        ):
            # A device that has no instance of its own gets the same one at each start.
            assert guest.offer.instance_id == uuid5(guest.offer.class_id, str(path))
    assert path.is_socket()  # it is not ours to remove


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--socket", "no/a.sock"], 1, "no: No such file or directory: the folder for a socket"),
        (["--socket", "a" * 108], 1, "a" * 108 + ": AF_UNIX path too long"),
        ([], 2, "required: --socket"),
        (["--socket", "a", "--socket-group", "no such"], 2, "there is no group no such"),
        (["--socket", "a", "--socket-mode", "1777"], 2, "three octal digits"),
        (["--socket", "a", "--connect", "--socket-mode", "660"], 2, "the socket is QEMU's"),
    ],
)
def test_a_mistake_is_said_in_words(
    words: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    options = make_parser().parse_args(["serve", DEVICE, *words])
    try:
        found = options.run(options)
    except SystemExit as ended:
        found = ended.code
    assert found == status
    said = capfd.readouterr().err
    assert message in said
    assert "Errno" not in said


def test_what_is_handed_over_and_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a:b"}
    with pytest.raises(ActivationError, match="one socket"):
        handed_over(environment)
    assert environment == {}
    assert handed_over({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) is None
    with socket.socket(socket.AF_UNIX) as one, open(os.devnull) as file, socket.socket() as inet:
        for fd, words in ((one, "listens"), (file, "is no socket"), (inet, "no UNIX stream")):
            copy = os.dup(fd.fileno())
            monkeypatch.setattr(activation, "FIRST", copy)
            with pytest.raises(ActivationError, match=words):
                handed_over({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"})
            with contextlib.suppress(OSError):
                os.close(copy)


def instance(device: str, *words: str) -> UUID | None:
    """The instance id that a device gets of itself."""
    options = _device_parser(device).parse_args([*words, "--socket", "a"])
    made = options.make_device(options)
    if isinstance(made, (ScsiController, NetworkCard)):
        made.close()
    return made.instance_id


def test_the_instance_is_the_same_at_each_start(tmp_path: Path) -> None:
    first, second = f"{tmp_path / 'a.raw'}:1M", f"{tmp_path / 'b.raw'}:1M"
    assert instance("scsi", first) == instance("scsi", first, second) is not None
    assert instance("scsi", first) != instance("scsi", second)
    assert instance("scsi", f"{first},serial=x") == instance("scsi", f"{second},serial=x")
    cards = [instance("net", "--link", f"none,mac=52:54:00:00:00:0{n}") for n in (1, 1, 2)]
    assert cards[0] == cards[1] != cards[2]
    assert cards[0] is not None
    # Two cards without an address of their own are told apart by their sockets.
    assert instance("net", "--link", "none") is None
    asked = UUID("01234567-89ab-cdef-0123-456789abcdef")
    for words in (("scsi", first), ("net", "--link", "none"), (DEVICE,)):
        assert instance(*words, "--instance-id", str(asked)) == asked


def test_ctrl_c_at_the_very_beginning_says_nothing() -> None:
    program = """
import runpy, sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "vhostvmbus.cli.serve":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
sys.argv = ["vhostvmbus"]
runpy.run_module("vhostvmbus", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
