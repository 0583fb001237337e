# SPDX-License-Identifier: GPL-2.0-or-later
"""The command, also as ``python -m vhostvmbus``: what has to be so before the rest is imported.

Descriptors 0 to 2 are open, so that no image, socket or TAP becomes one of them, and somebody's
``stderr`` with it. What is said on stderr may get lost, on a full disk for instance, and nothing
else comes of that. A Ctrl-C ends the process without a word, from the beginning on.
"""

import io
import os
import signal
import sys

_PLACEHOLDERS = (os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)
"""The ways to open ``/dev/null`` in the place of a closed descriptor. Who writes to a stdout that
is not there is told so, as ever."""


class _Lossy(io.FileIO):
    """A file that takes every byte, written or not."""

    def write(self, data: object) -> int:
        """Writes as much as can be written; says that it was all."""
        try:
            written = super().write(data)  # type: ignore[arg-type]
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written  # type: ignore[arg-type]


def keep_standard_streams() -> None:
    """Sees to it that there are descriptors 0 to 2, and files for them that do no harm."""
    for fd, flags in enumerate(_PLACEHOLDERS):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free
            os.set_inheritable(fd, True)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Lossy(2, "wb", closefd=False)),
        encoding=getattr(sys.stderr, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


def main() -> int:
    """Runs the command; returns its exit status."""
    keep_standard_streams()
    try:
        from vhostvmbus.cli import main as command

        return command()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
