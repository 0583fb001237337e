# SPDX-License-Identifier: GPL-2.0-or-later
"""The event loop of a device whose ``packet_received`` is an ``async def``; made on demand."""

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

log = logging.getLogger(__name__)

CANCEL_SECONDS = 0.5
"""The seconds that a task has to end in once it was cancelled."""


class DeviceLoop:
    """An asyncio loop on a thread of its own. Thread-safe."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: dict[object, set[asyncio.Task[None]]] = {}
        self.thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self.thread.start()

    def submit(
        self,
        key: object,
        coroutine: Coroutine[Any, Any, None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Runs ``coroutine``; ``failed`` gets its exception, on the loop's thread."""

        async def run() -> None:
            try:
                await coroutine
            except (SystemExit, KeyboardInterrupt) as error:
                failed(error)  # from a task it would end the loop, which is everybody's

        def begin() -> None:
            task = self._loop.create_task(run())
            tasks = self._tasks.setdefault(key, set())
            tasks.add(task)

            def done(finished: asyncio.Task[None]) -> None:
                tasks.discard(finished)
                if not finished.cancelled() and (error := finished.exception()) is not None:
                    failed(error)

            task.add_done_callback(done)

        self._loop.call_soon_threadsafe(begin)

    def cancel(self, keys: Iterable[object], grace: float) -> None:
        """Lets the tasks of ``keys`` finish for ``grace`` seconds, then cancels them.

        Returns when none runs any more, or when they have ignored that for too long. Must not be
        called on the loop's thread.
        """

        async def finish() -> None:
            tasks = [task for key in list(keys) for task in self._tasks.pop(key, ())]
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=grace)
                for task in late:
                    task.cancel()
                if late:
                    _, stuck = await asyncio.wait(late, timeout=CANCEL_SECONDS)
                    if stuck:
                        log.error("%d tasks ignore that they were cancelled", len(stuck))

        done = asyncio.run_coroutine_threadsafe(finish(), self._loop)
        try:
            done.result(grace + 2 * CANCEL_SECONDS)
        except TimeoutError:
            log.error("%s: a coroutine blocks the event loop", self.thread.name)

    def close(self) -> bool:
        """Cancels everything and ends the thread. Returns whether it has ended."""
        self.cancel(list(self._tasks), 0.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.thread.join(CANCEL_SECONDS)
        if self.thread.is_alive():
            return False
        self._loop.close()
        return True
