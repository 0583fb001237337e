# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU does, and says, when a back end has no answer for it, or no place."""

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bare_metal import Report, converse, plug, run_qemu, served_by
from tests.support.vhost_user_session import FEATURES
from tests.support.waiting import eventually, in_thread
from tests.vm.bare_metal.vmbus.messages import (
    ALIVE,
    CONTACT,
    GPADL_TORNDOWN,
    NOTHING,
    RESCIND_OFFER,
    CommandFor,
)
from tests.vm.bare_metal.vmbus.stopped import (
    DEVICE,
    LATE,
    SHORT,
    add_dimm,
    listening,
    options,
    qemu_with,
    stalling,
)
from vhostvmbus.guest.front_end import FrontEnd
from vhostvmbus.vm.backend import BackEndProcess
from vhostvmbus.vm.errors import VmError
from vhostvmbus.vm.qmp import Monitor
from vhostvmbus.wire.errors import NotStill

UNPLUGGED: Report = [
    *CONTACT,
    *[("good", 0), ("open", 0), ("close", RESCIND_OFFER), ("teardown", GPADL_TORNDOWN)],
    *ALIVE[:-1],
    ("offers", 0),
]


@pytest.fixture
def served(back_end: BackEndProcess) -> Iterator[FrontEnd]:
    """The front end that the back end serves."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(back_end.socket))
    front_end = FrontEnd(sock, FEATURES, lambda message: 0)
    front_end.negotiate()
    try:
        yield front_end
    finally:
        front_end.close()


def test_start_with_a_back_end_of_another(
    command_for: CommandFor, back_end: BackEndProcess, served: FrontEnd
) -> None:
    """QEMU ends with words that say where, and why."""
    done = run_qemu(command_for("life", *served_by(back_end)))
    assert done.returncode == 1
    assert f"back end at '{back_end.socket}'" in done.stderr
    assert "serves another front end" in done.stderr


def test_plug_with_a_back_end_of_another(
    command_for: CommandFor, back_end: BackEndProcess, served: FrontEnd, tmp_path: Path
) -> None:
    """Refused with words, and taken when the other one has left."""
    with qemu_with(command_for("life", *options(back_end.socket)), tmp_path) as qemu:
        for _ in range(3):
            with pytest.raises(VmError, match="serves another front end") as caught:
                qemu.monitor.command("device_add", **DEVICE)
            assert str(back_end.socket) in str(caught.value)
        served.close()
        plug(qemu.monitor)


def test_plug_with_a_silent_back_end(command_for: CommandFor, tmp_path: Path) -> None:
    """It has little time, and no other part of QEMU waits for longer."""
    path = tmp_path / "silent"
    with (
        listening(path) as listener,
        qemu_with(command_for("life", *options(path)), tmp_path) as qemu,
        listener.accept()[0] as silent,
    ):
        thread, outcome = in_thread(lambda: qemu.monitor.command("device_add", **DEVICE))
        assert len(silent.recv(100)) == 12
        assert qemu.other.command("query-status")["status"] == "prelaunch"
        thread.join(30)
        assert f"no back end answers at '{path}' in 2 seconds" in str(outcome[0])


@pytest.mark.parametrize("what", ["connected", "add", "code map"])
def test_plug_with_a_back_end_that_stops_to_answer(
    command_for: CommandFor, tmp_path: Path, what: str
) -> None:
    path = tmp_path / "sock"
    with (
        stalling(path, what) as stall,
        qemu_with(command_for("life", *options(path)), tmp_path) as qemu,
    ):
        with pytest.raises(VmError, match=LATE):
            plug(qemu.monitor, x_answer_timeout_ms=SHORT)
        assert stall.reached.acquire(timeout=0)
        assert qemu.other.command("query-status")["status"] == "prelaunch"


def test_silent_back_end_that_comes_back(command_for: CommandFor, tmp_path: Path) -> None:
    """Nothing waits for its first answer."""
    path = tmp_path / "sock"
    with contextlib.ExitStack() as stack:
        with stalling(path):
            command = command_for("life", *options(path, ""))
            qemu = stack.enter_context(qemu_with(command, tmp_path))
        with listening(path) as listener, listener.accept()[0] as silent:
            assert len(silent.recv(100)) == 12
            for _ in range(2):
                assert qemu.other.command("query-status")["status"] == "prelaunch"
            with pytest.raises(BlockingIOError):
                silent.recv(1, socket.MSG_DONTWAIT)


def test_end_with_a_silent_back_end(
    command_for: CommandFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU ends in order, and says nothing of a connection that it ends itself."""
    monkeypatch.setenv("MALLOC_PERTURB_", "90")
    path = tmp_path / "sock"
    with contextlib.ExitStack() as stack:
        with stalling(path):
            command = command_for("life", *options(path, ""))
            qemu = stack.enter_context(qemu_with(command, tmp_path))
        with listening(path) as listener, listener.accept()[0] as silent:
            assert len(silent.recv(100)) == 12
            qemu.monitor.command("quit")
            assert qemu.child.wait(30) == 0
    assert "closes the connection" not in qemu.said.read_text()


@pytest.mark.parametrize("what", ["connected", "add"])
def test_back_end_that_comes_back_and_stops_to_answer(
    command_for: CommandFor, tmp_path: Path, what: str
) -> None:
    """It is given up soon."""
    path = tmp_path / "sock"
    with contextlib.ExitStack() as stack:
        with stalling(path):
            command = command_for("life", *options(path, f"x-answer-timeout-ms={SHORT}"))
            qemu = stack.enter_context(qemu_with(command, tmp_path))
        with stalling(path, what) as stall:
            assert stall.reached.acquire(timeout=30)
            assert qemu.other.command("query-status")["status"] == "prelaunch"
            eventually(lambda: re.search(LATE, qemu.said.read_text()))


def test_turned_away_while_it_runs(command_for: CommandFor, tmp_path: Path) -> None:
    """Somebody else has the back end now: this is said once, however often it is tried."""
    path = tmp_path / "sock"
    with contextlib.ExitStack() as stack:
        with stalling(path):
            command = command_for("life", *options(path, ""))
            qemu = stack.enter_context(qemu_with(command, tmp_path))
        with listening(path) as listener:
            for _ in range(5):
                listener.accept()[0].close()
            # it has seen four of these
        assert qemu.said.read_text().count("closes the connection at once: it serves another") == 1


LIFE: dict[str, Report] = {
    "gpadl": [("good", 0), ("open", 1)],
    "open": [("good", 0), ("open", 1)],
    "close": [("good", 0), ("open", 0)],
    "teardown": [("good", 0), ("open", 0)],
    "reset": [("good", 0), ("open", 0)],
}
"""What the guest sees when the back end stops to answer at such a request."""
END: Report = [("close", NOTHING), ("teardown", GPADL_TORNDOWN), *ALIVE]


@pytest.mark.parametrize("what", LIFE)
def test_back_end_that_stops_to_answer(command_for: CommandFor, tmp_path: Path, what: str) -> None:
    """The bus goes on after the time that an answer may take, once for all requests."""
    path = tmp_path / "sock"
    said = tmp_path / "said"
    with stalling(path, what) as stall, said.open("w") as stderr:
        command = command_for("life", *options(path, f"x-answer-timeout-ms={SHORT}"))
        report = converse(command, lambda monitor, what: None, stderr)
        assert stall.reached.acquire(timeout=0)
        assert not stall.reached.acquire(timeout=0)
    assert report == [*CONTACT, *LIFE[what], *END]
    assert len(re.findall(LATE, said.read_text())) == 1


@pytest.mark.parametrize("what", ["gpadl", "open"])
def test_back_end_that_stops_to_answer_when_it_resumes(
    command_for: CommandFor, tmp_path: Path, what: str
) -> None:
    """The guest goes on with its channel, as without a back end."""
    path = tmp_path / "sock"
    with contextlib.ExitStack() as stack:
        first = contextlib.ExitStack()
        first.enter_context(stalling(path))
        stack.enter_context(first)

        def act(monitor: Monitor, number: int) -> None:
            first.close()
            stall = stack.enter_context(stalling(path, what))
            assert stall.reached.acquire(timeout=30)
            assert monitor.command("query-status")["running"]

        command = command_for("life", *options(path, f"x-answer-timeout-ms={SHORT}"))
        report = converse(command, act)
    assert report == [*CONTACT, ("good", 0), ("open", 0), *END]


@pytest.mark.parametrize("what", ["add", "code map"])
def test_memory_with_a_back_end_that_stops_to_answer(
    command_for: CommandFor, tmp_path: Path, what: str
) -> None:
    """The memory is plugged in; the back end is given up."""
    path = tmp_path / "sock"
    slots = ("-m", "128,slots=1,maxmem=1G")
    words = (*options(path, f"x-answer-timeout-ms={SHORT}"), *slots)
    with stalling(path) as stall, qemu_with(command_for("life", *words), tmp_path) as qemu:
        stall.stop_at(what)
        add_dimm(qemu, 0)
        assert stall.reached.acquire(timeout=0)
        assert qemu.other.command("query-status")["status"] == "prelaunch"
        eventually(lambda: re.search(LATE, qemu.said.read_text()))


def test_unplug_with_a_back_end_that_stops_to_answer(
    command_for: CommandFor, tmp_path: Path
) -> None:
    """``device_del`` returns; the device goes when the guest closes its channel."""

    def act(monitor: Monitor, what: int) -> None:
        monitor.command("device_del", id="dev0")
        assert monitor.command("query-status")["running"]

    path = tmp_path / "sock"
    with stalling(path, "unplug") as stall:
        command = command_for("life", *options(path, f"x-answer-timeout-ms={SHORT}"))
        report = converse(command, act)
        assert stall.reached.acquire(timeout=0)
    assert report == UNPLUGGED


def test_machine_reset_with_a_back_end_that_stops_to_answer(
    command_for: CommandFor, tmp_path: Path
) -> None:
    """``system_reset`` comes about; the guest starts again, and finds the device."""
    resets = []

    def act(monitor: Monitor, what: int) -> None:
        if not resets:
            resets.append(what)
            monitor.command("system_reset")
            eventually(lambda: monitor.count("RESET"))
            assert monitor.command("query-status")["running"]

    path = tmp_path / "sock"
    with stalling(path, "close") as stall:
        command = command_for("life", *options(path, f"x-answer-timeout-ms={SHORT}"))
        report = converse(command, act)
        assert stall.reached.acquire(timeout=0)
    first = [*CONTACT, ("good", 0), ("open", 0)]
    assert report == [*first, *CONTACT, ("good", 0), ("open", 1), *END]


def test_the_machine_stops_and_goes_on(command_for: CommandFor, tmp_path: Path) -> None:
    """``stop`` returns when the back end stands still; ``cont`` lets it go on before the guest."""

    def act(monitor: Monitor, what: int) -> None:
        for _ in range(2):
            monitor.command("stop")
            assert calls()[-1] == "suspend"
            monitor.command("cont")
            assert calls()[-1] == "go on"
        monitor.command("device_del", id="dev0")

    def calls() -> list[object]:
        return [call[0] for call in stall.run.back_end.calls]

    path = tmp_path / "sock"
    with stalling(path, "unplug") as stall:
        command = command_for("life", *options(path, f"x-answer-timeout-ms={SHORT}"))
        assert converse(command, act) == UNPLUGGED
    assert calls().count("suspend") == calls().count("go on") == 2


def test_a_back_end_that_does_not_stand_still(command_for: CommandFor, tmp_path: Path) -> None:
    """The machine stops all the same, and QEMU says what may change still."""

    def act(monitor: Monitor, what: int) -> None:
        stall.run.back_end.refuse["suspend"] = NotStill("packets are under way")
        monitor.command("stop")
        assert not monitor.command("query-status")["running"]
        monitor.command("cont")
        monitor.command("device_del", id="dev0")

    path = tmp_path / "sock"
    said = tmp_path / "said"
    with stalling(path, "unplug") as stall, said.open("w") as stderr:
        command = command_for("life", *options(path, f"x-answer-timeout-ms={SHORT}"))
        assert converse(command, act, stderr) == UNPLUGGED
    assert "the machine is stopped, but not the back end: status 0xc00000b5" in said.read_text()


def test_a_back_end_that_comes_while_the_machine_is_stopped(
    command_for: CommandFor, tmp_path: Path
) -> None:
    """It learns of memory and GPADLs; its channels are opened when the guest goes on."""
    path = tmp_path / "sock"
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(stalling(path))

        def act(monitor: Monitor, what: int) -> None:
            monitor.command("stop")
            first.close()
            stall = second.enter_context(stalling(path, "unplug"))
            back_end = stall.run.back_end
            eventually(lambda: back_end.calls_of("gpadl"))
            assert not monitor.command("query-status")["running"]
            assert not back_end.calls_of("open")
            monitor.command("cont")
            assert back_end.calls[-1] == ("open",)
            assert not back_end.calls_of("go on")
            monitor.command("device_del", id="dev0")

        command = command_for("life", *options(path, f"x-answer-timeout-ms={SHORT}"))
        assert converse(command, act) == UNPLUGGED


def test_slow_answers_share_the_time_of_one(command_for: CommandFor, tmp_path: Path) -> None:
    """A guest that starts anew closes its channel and resets: both together have one time-out."""
    path = tmp_path / "sock"
    said = tmp_path / "said"
    with stalling(path) as stall, said.open("w") as stderr:

        def act(monitor: Monitor, number: int) -> None:
            if monitor.count("RESET"):
                return  # the second time
            stall.slow_down(0.7 * SHORT / 1000)
            monitor.command("system_reset")
            eventually(lambda: monitor.count("RESET"))
            assert monitor.command("query-status")["running"]
            stall.slow_down(0)

        command = command_for("life", *options(path, f"x-answer-timeout-ms={SHORT}"))
        converse(command, act, stderr)
    calls = [call[0] for call in stall.run.back_end.calls]
    assert calls[calls.index("close") :][:3] == ["close", "reset", "disconnect"]
    assert len(re.findall(LATE, said.read_text())) == 1
