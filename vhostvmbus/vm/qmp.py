# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's monitor for callers without an event loop: one runs in a thread of its own."""

import asyncio
import contextlib
import socket
import threading
from typing import Any

from qemu.qmp import EventListener, QMPClient, QMPError

from vhostvmbus.vm.errors import VmError


class Monitor:
    """A QMP session on a connected socket, which it takes over.

    ``events`` are the events so far, oldest first. Raises VmError where QEMU does not answer.
    """

    def __init__(self, sock: socket.socket, patience: float = 30.0) -> None:
        self.events: list[dict[str, Any]] = []
        self._client = QMPClient("vhostvmbus")
        self._listener = EventListener()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)
        self._thread.start()
        try:
            self._call(self._connect(sock), patience)
        except BaseException:
            self.close()
            raise

    async def _connect(self, sock: socket.socket) -> None:
        self._client.register_listener(self._listener)
        await self._client.connect(sock)
        self._collector = asyncio.create_task(self._collect())

    async def _collect(self) -> None:
        async for event in self._listener:
            self.events.append(dict(event))

    def _call(self, work: Any, patience: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(patience)
        except TimeoutError as error:
            future.cancel()
            raise VmError(f"QEMU's monitor did not answer within {patience:.0f} s") from error
        except (QMPError, OSError) as error:
            raise VmError(f"QEMU's monitor: {error}") from error

    def command(self, name: str, patience: float = 30.0, **arguments: object) -> Any:
        """Executes the command ``name``; returns its result. Underscores in names become dashes."""
        arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self._call(self._client.execute(name, arguments or None), patience)

    def count(self, event: str) -> int:
        """Returns how often ``event`` has come."""
        return sum(1 for seen in self.events if seen["event"] == event)

    def close(self) -> None:
        """Hangs up."""
        if not self._thread.is_alive():
            return
        with contextlib.suppress(VmError):
            self._call(self._goodbye(), 5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    async def _goodbye(self) -> None:
        with contextlib.suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()
        if hasattr(self, "_collector"):
            self._collector.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._collector
