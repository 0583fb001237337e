# SPDX-License-Identifier: GPL-2.0-or-later
"""Looks again whenever something happens to an interface of the host.

The kernel announces changes of interfaces to a netlink socket (rtnetlink(7), RTMGRP_LINK). What
an announcement says is not used: it may be old, and some may have been lost. It is a reason to
look at how things are.
"""

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from vhostvmbus.devices.net.link.namespace import enter

log = logging.getLogger(__name__)

_LINK_GROUP = 1
_RETRY = 1.0
Look = Callable[[IPRoute], float | None]
"""Looks, through the socket given.

Returns the seconds after which to look again in any case, or ``None``.
"""


class Watch:
    """A thread that calls ``look`` when something happened to an interface.

    It runs in the network namespace ``namespace`` (``None``: this thread's). It calls once at its
    start, after each announcement, and when the time that ``look`` gave is over.
    """

    def __init__(self, name: str, namespace: str | None, look: Look) -> None:
        self._namespace = namespace
        self._look = look
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"{name}/watch", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; ``look`` is not called any more when this returns."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if self._thread.is_alive():
            self._thread.join()
        os.close(self._wake)

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # a namespace that has gone cannot be watched
            enter(self._namespace)
            while not self._closing:
                try:
                    with IPRoute() as announced, IPRoute() as route:
                        announced.bind(groups=_LINK_GROUP)
                        self._watch(announced, route)
                except (OSError, NetlinkError) as error:
                    # Announcements were lost, or the kernel is short of memory.
                    log.info("the watch of interfaces starts over: %s", error)
                    if self._pause(_RETRY):
                        return

    def _pause(self, seconds: float) -> bool:
        """Waits. Returns true if it is time to end."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.poll(seconds * 1000)
        return self._closing

    def _watch(self, announced: IPRoute, route: IPRoute) -> None:
        poll = select.poll()
        poll.register(announced.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._closing:
            again = self._look(route)
            ready = poll.poll(None if again is None else again * 1000)
            if any(fd != self._wake for fd, _ in ready):
                for _ in announced.get():
                    pass
