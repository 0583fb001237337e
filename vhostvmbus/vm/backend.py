# SPDX-License-Identifier: GPL-2.0-or-later
"""A back end process: ``vhostvmbus serve …`` on a socket in the run's folder.

A process of its own, so that it can be killed and started again while the guest runs.
"""

import os
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vhostvmbus.vm.device_output import DeviceOutput
from vhostvmbus.vm.errors import SetupError
from vhostvmbus.vm.process import Child

SERVE = (sys.executable, "-m", "vhostvmbus", "serve")
START_PATIENCE = 30.0
"""Seconds that a back end has from its start until it listens."""


class BackEndProcess:
    """Serves one device; ``words`` are what follows ``vhostvmbus serve``.

    What it writes goes to a file in ``folder``, or to ``output``, which somebody else closes.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        folder: Path,
        serve: Sequence[str] = SERVE,
        output: DeviceOutput | None = None,
    ) -> None:
        self.name = name
        self.socket = folder / f"{name}.sock"
        self._words = [*serve, *words]
        self._log = folder / f"{name}.log"
        self._output = output
        self._child: Child | None = None
        self.start()

    def start(self) -> None:
        """Starts the process, waits until it listens; else raises SetupError with what it said."""
        reader, writer = os.pipe()
        try:
            argv = [*self._words, "--socket", str(self.socket), "--ready-fd", str(writer)]
            self._child = Child(self.name, argv, self._log, pass_fds=(writer,), output=self._output)
            os.close(writer)
            writer = -1
            deadline = time.monotonic() + START_PATIENCE
            readable, _, _ = select.select([reader], [], [], deadline - time.monotonic())
            if readable and os.read(reader, 1):
                return
            self._child.terminate(2.0)
            words = self._child.last_words()
            raise SetupError(f"the back end {self.name} did not start:\n{words}")
        finally:
            os.close(reader)
            if writer >= 0:
                os.close(writer)

    @property
    def child(self) -> Child:
        """The process that serves the device."""
        assert self._child is not None
        return self._child

    @property
    def problem(self) -> str | None:
        """The trouble, if the process ended by itself; ``None`` otherwise."""
        status = self.child.status
        if status is None:
            return None
        return f"the back end {self.name} ended with status {status}:\n{self.child.last_words()}"

    def kill(self) -> None:
        """Kills the process, as a crash would end it."""
        self.child.kill()

    def stop(self) -> None:
        """Asks the process to end."""
        if self._child is not None:
            self._child.terminate()
