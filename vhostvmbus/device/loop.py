# SPDX-License-Identifier: GPL-2.0-or-later
"""The event loop of a device whose ``packet_received`` is an ``async def``; made on demand."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class DeviceLoop:
    """An asyncio loop on a thread of its own. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[object, set[asyncio.Task[None]]] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(
        self,
        key: object,
        coroutine: Coroutine[Any, Any, None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Runs ``coroutine``; ``failed`` gets its exception, on the loop's thread."""

        def begin() -> None:
            task = self._loop.create_task(coroutine)
            tasks = self._tasks.setdefault(key, set())
            tasks.add(task)

            def done(finished: asyncio.Task[None]) -> None:
                tasks.discard(finished)
                if not finished.cancelled() and (error := finished.exception()) is not None:
                    failed(error)

            task.add_done_callback(done)

        self._loop.call_soon_threadsafe(begin)

    def cancel(self, key: object, grace: float = 1.0) -> None:
        """Lets the tasks of ``key`` finish for ``grace`` seconds, then cancels them.

        Returns when none runs any more. Must not be called on the loop's thread.
        """

        async def finish() -> None:
            tasks = self._tasks.pop(key, set())
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=grace)
                for task in late:
                    task.cancel()
                if late:
                    _, stuck = await asyncio.wait(late, timeout=5.0)
                    if stuck:
                        log.error("%d tasks ignore that they were cancelled", len(stuck))

        asyncio.run_coroutine_threadsafe(finish(), self._loop).result()

    def close(self) -> None:
        """Cancels everything and ends the thread."""
        for key in list(self._tasks):
            self.cancel(key, 0.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
