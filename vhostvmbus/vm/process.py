# SPDX-License-Identifier: GPL-2.0-or-later
"""Child processes that cannot outlive us, and the folder of one run.

Invariants:

* A child is killed by the kernel when the thread that started it ends, however that comes
  about (``prctl(2)``, PR_SET_PDEATHSIG, through ``setpriv(1)``). Start one from a thread that
  lives as long as the child shall.
* A child has a session of its own, so a Ctrl-C on the terminal reaches only us, and we end things
  in order.
* A run's folder is held by a lock. One that nobody holds was left by a process that was killed,
  and the next run removes it.
* What a run writes is in folders that nobody else can write to: what lies in ``/tmp`` under our
  name may be somebody else's, and is used only if it is a folder of ours, and closed to others.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vhostvmbus.vm.cache import cache_root
from vhostvmbus.vm.device_output import DeviceOutput
from vhostvmbus.vm.errors import SetupError

SOCKET_PATH_LIMIT = 80
"""Longest path of a run's folder; ``sun_path`` has 108 bytes, and a name comes behind."""


class RunFolder:
    """A folder for the sockets, disks and logs of one run; gone after :meth:`close`.

    It goes as well when nobody has it any more, for a signal may end its making at any point.
    """

    def __init__(self) -> None:
        room = room_for_runs()
        with _held(room / ".lock"):
            # Nobody makes a folder meanwhile, so one that is not held is one that was left.
            for folder in left_over(room):
                shutil.rmtree(folder, ignore_errors=True)
            self.path = room / f"tmp{secrets.token_hex(4)}"
            self._forgotten = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
            self.path.mkdir(mode=0o700)
            self._lock = _open_lock(self.path / "lock")
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Removes the folder."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            self._forgotten.detach()
            os.close(self._lock)
            self._lock = -1


def room_for_runs() -> Path:
    """Returns the folder that the folders of runs are in, made if absent.

    It is in the cache, unless its path would be too long for a socket in it, or it is not ours.
    """
    room = cache_root() / "runs"
    if len(str(room)) <= SOCKET_PATH_LIMIT:
        room.mkdir(mode=0o700, exist_ok=True)
        if _is_ours(room.resolve()):
            return room
    return _short_room()


def _short_room() -> Path:
    """Returns a folder of ours in ``/tmp``: the same one for every run that finds it.

    Whoever else has put something there under the usual name does not get our runs into it.
    """
    usual = Path(tempfile.gettempdir()) / f"vhostvmbus-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        usual.mkdir(mode=0o700)
    for room in (usual, *sorted(usual.parent.glob(f"{usual.name}-*"))):
        if _is_ours(room):
            return room
    return Path(tempfile.mkdtemp(prefix=f"{usual.name}-"))


def _is_ours(room: Path) -> bool:
    """Returns whether ``room`` is a folder, no link to one, that only we can write to."""
    try:
        found = room.lstat()
    except OSError:  # it has just gone
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    return (
        stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & others
    )


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    fd = _open_lock(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def left_over(room: Path) -> list[Path]:
    """Returns the folders in ``room`` whose run is no more."""
    found = []
    for folder in room.iterdir():
        if not folder.is_dir():
            continue
        fd = -1
        try:
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(folder)
        except FileNotFoundError:
            found.append(folder)
        except OSError:
            pass
        finally:
            if fd >= 0:
                os.close(fd)
    return found


class Child:
    """A process of ours; its output goes to ``log``, or to ``output`` if that is given."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str | os.PathLike[str]],
        log: Path,
        *,
        pass_fds: Sequence[int] = (),
        env: Mapping[str, str] | None = None,
        output: DeviceOutput | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._output = output
        with contextlib.ExitStack() as stack:
            target = output or stack.enter_context(open(log, "ab"))
            self._process = self._start(argv, target.fileno(), pass_fds, env)
        self.pid = self._process.pid

    def _start(
        self,
        argv: Sequence[str | os.PathLike[str]],
        output: int,
        pass_fds: Sequence[int],
        env: Mapping[str, str] | None,
    ) -> "subprocess.Popen[bytes]":
        words = ["setpriv", "--pdeathsig", "KILL", "--", *(os.fspath(word) for word in argv)]
        try:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=pass_fds,
                env=env,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise SetupError(f"the program {error.filename} is not installed") from error

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; ``None`` while the process runs."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits for the end; returns ``None`` if the process runs on after ``timeout`` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kills the process at once."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def terminate(self, patience: float = 5.0) -> None:
        """Asks the process to end; kills it after ``patience`` seconds."""
        if self.status is None:
            self._process.terminate()
            if self.wait(patience) is None:
                self.kill()

    def last_words(self, lines: int = 15) -> str:
        """Returns the end of the process's output."""
        if self._output is not None:
            text = self._output.last_words()
        else:
            try:
                text = self.log.read_text(errors="replace")
            except OSError:
                return ""
        return "\n".join("  | " + line for line in text.splitlines()[-lines:])
