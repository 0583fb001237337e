# SPDX-License-Identifier: GPL-2.0-or-later
"""Steps that take a while: their progress, their usual time, and a log for the rest.

A step's commands write to a log file. On success one line remains on stderr; on failure the line
names the log and shows its end. Commands run in a process group of their own that dies with the
step, whatever ends it. A download that the network failed is tried again (``retry``).
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from . import retry
from .cache import cache_root

COUNTED = re.compile(rb"^\[(\d+)/(\d+)\]")
TAIL_LINES = 25
PLAIN_INTERVAL = 20.0
"""Seconds between two lines of progress when stderr is not a terminal."""


class BuildError(Exception):
    """A failure of a build step; the message is for the user."""


def _durations_path() -> Path:
    return cache_root() / "durations.json"


def _usual_seconds(name: str, default: float) -> float:
    try:
        return float(json.loads(_durations_path().read_text())[name])
    except (OSError, ValueError, KeyError, TypeError):
        return default


def _remember_seconds(name: str, seconds: float) -> None:
    path = _durations_path()
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    known[name] = round(seconds, 1)
    temporary = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(known, indent=1, sort_keys=True))
        os.replace(temporary, path)


def _minutes(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


class Step:
    """One long step, as a context manager around its commands.

    ``usual`` is the time in seconds it is expected to take on a small machine, replaced by the
    time that it took here last.
    """

    def __init__(self, name: str, what: str, usual: float) -> None:
        self.name = name
        self.what = what
        self.usual = _usual_seconds(name, usual)
        logs = cache_root() / "logs"
        logs.mkdir(exist_ok=True)
        self.log_path = logs / f"{name}.log"
        self._terminal = sys.stderr.isatty()
        self._said = 0.0
        self._waited = 0.0

    def __enter__(self) -> "Step":
        self._log = open(self.log_path, "wb")
        self._start = time.monotonic()
        self._said = self._start
        self._line(f"{self.what} (usually {_minutes(self.usual)})", last=not self._terminal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._log.close()
        seconds = time.monotonic() - self._start
        if kind is None:
            _remember_seconds(self.name, seconds - self._waited)
            self._line(f"{self.what}: done in {_minutes(seconds)}", last=True)
            return
        if issubclass(kind, KeyboardInterrupt):
            self._line(f"{self.what}: interrupted after {_minutes(seconds)}", last=True)
            return
        self._line(f"{self.what}: FAILED after {_minutes(seconds)}", last=True)
        for line in self.log_path.read_bytes().splitlines()[-TAIL_LINES:]:
            print("  | " + line.decode(errors="replace"), file=sys.stderr)
        print(f"  The whole log: {self.log_path}", file=sys.stderr)

    def _line(self, text: str, last: bool) -> None:
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r\x1b[K" + text[:width] + ("\n" if last else ""))
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def _progress(self, done: str) -> None:
        now = time.monotonic()
        if now - self._said < (0.3 if self._terminal else PLAIN_INTERVAL):
            return
        self._said = now
        elapsed = now - self._start
        text = f"{self.what}: {done}{_minutes(elapsed)} of usually {_minutes(self.usual)}"
        self._line(text, last=not self._terminal)

    def note(self, text: str) -> None:
        """Writes ``text`` to the log."""
        self._log.write(text.encode() + b"\n")
        self._log.flush()

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
    ) -> None:
        """Runs a command, its output to the log. Raises BuildError if it fails.

        A download that fails for a reason that may pass is tried again, after a while.
        """
        words = [os.fspath(word) for word in argv]
        if not retry.downloads(words):
            self._require(words, self._run_once(words, cwd, env, stdin))
            return
        env = retry.in_english(os.environ if env is None else env)
        try:
            delays = retry.delays()
        except ValueError as error:
            raise BuildError(str(error)) from error
        for number, delay in enumerate([*delays, None], 1):
            start = self._log.tell()
            status = self._run_once(words, cwd, env, stdin)
            reason = retry.passing_reason(self._logged(start)) if status else ""
            if not reason:
                self._require(words, status)
                return
            if delay is None:
                raise BuildError(f"{self.what}: {words[0]} {retry.advice(number, reason)}")
            self._wait(f"try {number} of {len(delays) + 1} failed", delay, reason)

    def _require(self, words: Sequence[str], status: int) -> None:
        if status != 0:
            raise BuildError(f"{self.what}: {words[0]} ended with status {status}")

    def _logged(self, start: int) -> str:
        """Returns what commands wrote to the log from an offset on."""
        with open(self.log_path, "rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")

    def _wait(self, what: str, delay: float, reason: str) -> None:
        self._waited += delay
        self._line(f"{self.what}: {what}, the next in {delay:g} s: {reason}", last=True)
        self.note(f"{what}; waiting for {delay:g} s")
        time.sleep(delay)

    def _run_once(
        self,
        words: Sequence[str],
        cwd: Path | None,
        env: Mapping[str, str] | None,
        stdin: bytes | None,
    ) -> int:
        """Runs a command, its output to the log. Returns its exit status."""
        self.note("+ " + " ".join(words))
        with _child(
            words,
            cwd=cwd,
            env=env,
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        ) as child:
            if stdin is not None:
                assert child.stdin is not None
                with contextlib.suppress(BrokenPipeError):
                    child.stdin.write(stdin)
                    child.stdin.close()
            self._follow(child)
            return child.wait()

    def _follow(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        fd = child.stdout.fileno()
        partial = b""
        while block := os.read(fd, 65536):
            self._log.write(block)
            self._log.flush()
            lines = (partial + block).split(b"\n")
            partial = lines.pop()
            done = ""
            for line in reversed(lines):
                if found := COUNTED.match(line):
                    step, steps = int(found[1]), int(found[2])
                    done = f"{step} of {steps} ({100 * step // max(steps, 1)} %), "
                    break
            self._progress(done)


@contextlib.contextmanager
def _child(
    words: Sequence[str],
    *,
    cwd: Path | None,
    env: Mapping[str, str] | None,
    stdin: int,
) -> Iterator[subprocess.Popen[bytes]]:
    try:
        child = subprocess.Popen(
            words,
            cwd=cwd,
            env=env,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise BuildError(f"the program {error.filename} is not installed") from error
    try:
        yield child
    finally:
        for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            if child.poll() is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        if child.stdout is not None:
            child.stdout.close()


def main_guard(main: "object") -> None:
    """Runs ``main()`` as a program: SIGTERM acts like Ctrl-C, errors become one line."""
    assert callable(main)

    def terminated(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGHUP, terminated)
    try:
        status = main()
        sys.stdout.flush()
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever wanted to know the result has gone; the result is in the cache all the same.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(status)
