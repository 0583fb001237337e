# SPDX-License-Identifier: GPL-2.0-or-later
"""The cache folder, and what leaves it: results that nothing has used for 30 days.

Invariants:

* A result is a file or folder ``<cache>/…/<room>/<key>`` whose content never changes. The time of
  its last modification is that of its last use.
* Results are removed under the same lock as they are stamped under: who could stamp one keeps it,
  and who comes later finds nothing to stamp and has it made again. A folder gets another name
  first, so that there is never half a result.
"""

import contextlib
import fcntl
import os
import pwd
import re
import shutil
import time
from pathlib import Path

from vhostvmbus.vm.errors import SetupError

UNUSED_SECONDS = 30 * 86400
KEPT_LOGS = 10
"""How many old logs of a kind stay when there is another one."""
KEY = re.compile(r"(?:.+-)?[0-9a-f]{20}(?:\.cpio)?")
"""The names of results: the key, alone for a folder; an initramfs says the kernel, too."""


def cache_root() -> Path:
    """Returns the project's cache folder, made if absent: ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises SetupError if neither says where that is.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(_home(), ".cache")
    if not os.path.isabs(base):
        raise SetupError(f"the cache cannot be in {base}: XDG_CACHE_HOME and HOME begin with a /")
    root = Path(base) / "vhostvmbus"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _home() -> str:
    if home := os.environ.get("HOME"):
        return home
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise SetupError("there is no folder for the cache: set HOME or XDG_CACHE_HOME") from None


def new_log(kind: str, name: str) -> Path:
    """Returns the path for a log, ``<cache>/logs/KIND-NAME.log``.

    Of the logs of its kind that are there, removes all but the newest.
    """
    logs = cache_root() / "logs"
    logs.mkdir(mode=0o700, exist_ok=True)  # what guests and devices write is their owner's
    for path in sorted(logs.glob(f"{kind}-*.log"), key=_last_written)[:-KEPT_LOGS]:
        path.unlink(missing_ok=True)
    return logs / f"{kind}-{name}.log"


def _last_written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another run has just removed it
        return 0.0


def use(path: Path) -> bool:
    """Stamps the result that ``path`` is, or is in, as used now; removes old ones of its room.

    Returns false if it has gone. What is not in the cache has no stamp.
    """
    root = cache_root()
    result = next((p for p in (path, path.parent) if KEY.fullmatch(p.name)), None)
    if result is None or not result.resolve().is_relative_to(root.resolve()):
        return path.exists()
    try:
        with open(root / ".lock-used", "a") as lock:
            os.fchmod(lock.fileno(), 0o600)  # whoever can read it could hold it for ever
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.utime(result)
            with contextlib.suppress(OSError):  # the next use tries again
                _remove_unused(result.parent)
    except FileNotFoundError:
        return False
    except OSError:  # somebody else's cache is not ours to keep tidy
        return path.exists()
    return path.exists()


def _remove_unused(room: Path) -> None:
    limit = time.time() - UNUSED_SECONDS
    for result in room.iterdir():
        if KEY.fullmatch(result.name) and result.stat().st_mtime < limit:
            if result.is_dir():
                # Half a result has another name. The next build removes what is left of it.
                half = result.rename(result.with_name(f".work-{result.name}"))
                shutil.rmtree(half, ignore_errors=True)
            else:
                result.unlink()
