# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device writes: cut into lines, bounded, shown as it comes, kept in a file.

The devices are child processes, as they are under ``vhostvmbus vm``.
"""

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.paths import PROGRAMS
from tests.support.waiting import eventually, nothing_left_behind
from vhostvmbus.vm import device_output
from vhostvmbus.vm.device_output import DeviceOutput, KeptFile, Lines, titles
from vhostvmbus.vm.errors import SetupError
from vhostvmbus.vm.machine import Machine, MachinePlan
from vhostvmbus.vm.process import Child

TALKATIVE = f"{PROGRAMS / 'talkative.py'}:Talkative"
MEBIBYTE = 1 << 20


def test_each_device_has_a_name_of_its_own() -> None:
    devices = ["a/b.py:Echo", "/x:y/c.py:Echo", "scsi", "d.py:Ech/o", "e.py:Echo"]
    assert titles(devices) == ["Echo", "Echo-2", "scsi", "Ech_o", "Echo-3"]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_are_whole_however_they_come(size: int) -> None:
    lines, shown = Lines(), []
    data = "one\ntwo\r\n\nthe ünd".encode()
    for at in range(0, len(data), size):
        shown += lines.feed(data[at : at + size], 0.0)
    assert shown == ["one", "two", ""]
    assert lines.finish() == ["the ünd"]
    assert lines.finish() == []


def test_a_line_does_nothing_to_the_terminal() -> None:
    data = b"\x1b[2J\x07a\tb\xff\r\rno\x00\xe2\x80\xae\n"
    assert Lines().feed(data, 0.0) == [r"\x1b[2J\x07a" + "\t" + r"b\xff\r\rno\x00\u202e"]


def test_a_long_line_is_cut_and_says_so() -> None:
    lines = Lines(longest=10)
    assert lines.feed(b"0123456789\n", 0.0) == ["0123456789"]
    assert [lines.feed(b"x" * 7, 0.0) for _ in range(1000)] == [[]] * 1000
    (line,) = lines.feed(b"y\nshort\n", 0.0)[:1]
    assert line == "x" * 10 + " (6991 more bytes of this line are not shown)"
    assert lines.feed(b"short\n", 0.0) == ["short"]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_burst_is_shown_and_the_rest_counted(size: int) -> None:
    """However the bytes come; the next period begins anew."""
    lines, shown = Lines(burst=3, period=10.0), []
    data = b"".join(b"line %d\n" % number for number in range(20)) + b"par"
    for at in range(0, len(data), size):
        shown += lines.feed(data[at : at + size], 100.0)
    assert shown == ["line 0", "line 1", "line 2"]
    assert lines.due == 110.0
    assert lines.look(109.9) == []
    assert lines.look(110.0) == ["(17 more lines within 10 s are not shown)"]
    assert lines.due is None
    assert lines.feed(b"tial\n", 111.0) == ["partial"]
    assert lines.feed(b"\n" * 3, 112.0) == ["", ""]
    assert lines.finish() == ["(1 more lines within 10 s are not shown)"]


def test_an_unfinished_line_of_a_flood_counts() -> None:
    lines = Lines(burst=1)
    assert lines.feed(b"a\nb", 0.0) == ["a"]
    assert lines.finish() == ["(1 more lines within 10 s are not shown)"]


def test_a_file_has_a_streams_beginning_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    kept = KeptFile(path)
    assert not path.exists()
    size = 0
    while size < 20 * MEBIBYTE:
        block = b"".join(b"%015d\n" % (size // 16 + line) for line in range(3000))
        kept.write(block)
        size += len(block)
    kept.close()
    lines = path.read_bytes().splitlines()
    assert lines[0] == b"%015d" % 0
    assert lines[-1] == b"%015d" % (size // 16 - 1)
    (place,) = [index for index, line in enumerate(lines) if line.startswith(b"(")]
    missing = int(lines[place][1:].split()[0])
    assert lines[place] == b"(%d bytes are left out here)" % missing
    beginning, end = lines[: place - 1], lines[place + 1 :]
    assert (len(beginning) + len(end)) * 16 + missing == size
    assert path.stat().st_size < device_output.KEPT_BEGINNING + device_output.KEPT_END + 100


def test_a_short_stream_is_kept_as_it_is(tmp_path: Path) -> None:
    kept = KeptFile(tmp_path / "log")
    for part in (b"a\r\n", b"\x1b\xff", b""):
        kept.write(part)
    kept.close()
    assert (tmp_path / "log").read_bytes() == b"a\r\n\x1b\xff"


class Shown:
    """What was shown, and the devices' way to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self._stack = ExitStack()

    def __call__(self, title: str, line: str) -> None:
        self.lines.append(f"{title}: {line}")

    def output(self, title: str = "Toy", **keywords: object) -> DeviceOutput:
        path = self.folder / f"{title}.log"
        output = DeviceOutput(title, path, self, Lines(**keywords))  # type: ignore[arg-type]
        self._stack.callback(output.close)
        return output

    def child(self, output: DeviceOutput, script: str, *fds: int) -> Child:
        words = [sys.executable, "-c", script, *map(str, fds)]
        child = Child("toy", words, self.folder / "unused", pass_fds=fds, output=output)
        self._stack.callback(child.kill)
        return child

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    with nothing_left_behind():
        shown = Shown(tmp_path)
        yield shown
        shown.close()
    assert not (tmp_path / "unused").exists()


LIVE = """\
import os, sys
print("one", flush=True)
os.read(int(sys.argv[1]), 1)
print("two", file=sys.stderr)
os.read(int(sys.argv[1]), 1)
"""


def test_lines_are_shown_while_the_device_runs(shown: Shown) -> None:
    reader, writer = os.pipe()
    output = shown.output()
    child = shown.child(output, LIVE, reader)
    eventually(lambda: shown.lines == ["Toy: one"])
    os.write(writer, b"x")
    eventually(lambda: shown.lines == ["Toy: one", "Toy: two"])
    assert child.status is None
    os.write(writer, b"x")
    assert child.wait(20) == 0
    output.close()
    assert output.path is not None
    assert output.path.read_text() == "one\ntwo\n"
    assert output.fate == f"what Toy wrote is in {output.path}"
    os.close(reader)
    os.close(writer)


def test_the_last_words_of_a_device_are_there_when_it_has_ended(shown: Shown) -> None:
    output = shown.output()
    child = shown.child(output, "for n in range(1000): print('line', n)\n1 / 0")
    assert child.wait(20) == 1
    words = child.last_words(4).splitlines()
    assert words[-1] == "  | ZeroDivisionError: division by zero"
    assert len(words) == 4
    output.close()
    assert child.last_words(4).splitlines() == words


def test_a_device_that_is_started_again_goes_on_in_the_same_file(shown: Shown) -> None:
    output = shown.output()
    for number in range(3):
        assert shown.child(output, f"print({number})").wait(20) == 0
    output.close()
    assert shown.lines == ["Toy: 0", "Toy: 1", "Toy: 2"]
    assert output.path is not None
    assert output.path.read_text() == "0\n1\n2\n"


def test_a_silent_device_leaves_nothing(shown: Shown) -> None:
    output = shown.output()
    assert shown.child(output, "").wait(20) == 0
    output.close()
    output.close()
    assert shown.lines == []
    assert output.fate == ""
    assert list(shown.folder.iterdir()) == []


FLOOD = """\
import os
os.write(1, b"the first\\n")
block = b"".join(b"flood %d\\n" % n for n in range(8000))
for _ in range(1000): os.write(1, block)
os.write(1, b"the last\\n")
"""


def test_a_flood_fills_nothing_and_keeps_nobody_waiting(shown: Shown) -> None:
    """Some 90 MB."""
    output = shown.output(burst=50, period=3600.0)
    tracemalloc.start()
    try:
        assert shown.child(output, FLOOD).wait(100) == 0
        output.close()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MEBIBYTE
    assert shown.lines[0] == "Toy: the first"
    assert shown.lines[49:] == [
        "Toy: flood 48",
        f"Toy: ({1000 * 8000 + 2 - 50} more lines within 3600 s are not shown)",
    ]
    assert output.path is not None
    kept = output.path.read_bytes()
    assert len(kept) < 5 * MEBIBYTE
    assert kept.startswith(b"the first\nflood 0\n")
    assert kept.endswith(b"flood 7999\nthe last\n")


def test_what_was_left_out_is_said_though_nothing_comes_any_more(shown: Shown) -> None:
    reader, writer = os.pipe()
    output = shown.output(burst=1, period=0.1)
    shown.child(
        output, "import os, sys\nos.write(1, b'a\\nb\\n')\nos.read(int(sys.argv[1]), 1)", reader
    )
    eventually(lambda: shown.lines == ["Toy: a", "Toy: (1 more lines within 0.1 s are not shown)"])
    os.close(reader)
    os.close(writer)


def test_who_inherited_the_pipe_does_not_keep_it_from_ending(shown: Shown) -> None:
    """A device may start programs that live on."""
    output = shown.output()
    script = "import subprocess\nprint(subprocess.Popen(['sleep', '1000']).pid)"
    assert shown.child(output, script).wait(20) == 0
    eventually(lambda: shown.lines)
    pid = int(shown.lines[0].split()[1])
    try:
        output.close()
        assert Path(f"/proc/{pid}").exists()
    finally:
        os.kill(pid, 9)


def test_a_full_disk_is_said_and_lines_are_shown(shown: Shown) -> None:
    output = DeviceOutput("Toy", Path("/dev/full"), shown)
    try:
        assert shown.child(output, "print('one')\nprint('two')").wait(20) == 0
    finally:
        output.close()
    assert shown.lines == ["Toy: one", "Toy: two"]
    assert "could not be kept" in output.fate
    assert "No space left" in output.fate


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vhostvmbus"


def test_a_device_that_does_not_start_has_said_why(cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("print('about to')\n1 / 0\n")
    shown: list[tuple[str, str]] = []
    nowhere = Path("/nonexistent")
    devices = [[TALKATIVE], [f"{broken}:Broken"]]
    plan = MachinePlan(
        nowhere, nowhere, nowhere, backends=devices, show=lambda *line: shown.append(line)
    )
    with nothing_left_behind():
        machine = Machine(plan)
        with pytest.raises(SetupError, match="ZeroDivisionError"):
            machine.start()
        machine.close()
    assert ("Talkative", "the file is read") in shown
    assert ("Broken", "about to") in shown
    assert shown[-1] == ("Broken", "ZeroDivisionError: division by zero")
    logs = cache / "logs"
    kept = [output.path for output in machine.outputs]
    assert kept == [
        logs / f"device-{machine.folder.name}-{name}.log" for name in ("Talkative", "Broken")
    ]
    assert [path.read_text().splitlines()[0] for path in kept if path] == [
        "the file is read",
        "about to",
    ]


def run_vm(*words: str) -> "subprocess.CompletedProcess[str]":
    """The command with a QEMU that does not start."""
    return subprocess.run(
        [sys.executable, "-m", "vhostvmbus", "vm", "--accel", "tcg", "--no-root", "--net", "none",
         "--kernel", "/etc/hostname", "--initramfs", "/etc/hostname", "--qemu", "/bin/false",
         "--device", TALKATIVE, "--cmd", "true", *words],
        capture_output=True, text=True,
    )  # fmt: skip


def test_the_command_shows_the_lines_and_names_the_file(cache: Path) -> None:
    done = run_vm()
    assert done.returncode == 125
    assert done.stdout == ""
    assert "Talkative: the file is read\n" in done.stderr
    (kept,) = (cache / "logs").glob("device-*.log")
    assert f"what Talkative wrote is in {kept}\n" in done.stderr
    assert kept.read_text() == "the file is read\n"


def test_a_machine_in_a_machine_shows_lines_and_keeps_none(cache: Path) -> None:
    done = run_vm("--keep-no-output")
    assert "Talkative: the file is read\n" in done.stderr
    assert "wrote" not in done.stderr
    assert list((cache / "logs").glob("device-*")) == []
