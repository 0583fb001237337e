# SPDX-License-Identifier: GPL-2.0-or-later
"""An unplug of a device: it has the guest's driver stop, then the front end may take the device.

docs/vhost-user-vmbus.md, *Unplugging*. Invariants: for each connection at most one thread, which
has ended, or asks for nothing any more, before the next connection begins; a connection that is
lost meanwhile is no error.
"""

import logging
import threading
from collections.abc import Callable

from vhostvmbus.channel.deadline import Deadline, LeftBehind
from vhostvmbus.wire.errors import OfferRefused
from vhostvmbus.wire.ntstatus import NtStatus

log = logging.getLogger(__name__)


class Unplugging:
    """A device on its way out of the guest.

    ``prepare`` is the device's part and may take its time; ``let_go`` asks the front end to
    rescind.
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[[], None],
        let_go: Callable[[], None],
        left: LeftBehind,
    ) -> None:
        self._left = left
        self._name = name
        self._prepare = prepare
        self._let_go = let_go
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Begins the device's part, for VMBUS_UNPLUG. Returns at once; a second time it does
        nothing.
        """
        if self._thread is None:
            log.info("%s is being unplugged", self._name)
            self._thread = threading.Thread(
                target=self._run, name=f"{self._name} unplug", daemon=True
            )
            self._thread.start()

    def end(self, deadline: Deadline) -> None:
        """Waits until the device's part has ended; called at the end of the connection.

        What has not ended at the deadline is left behind, and asks the front end for nothing.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        thread.join(deadline.left)
        if thread.is_alive():
            self._left.add(thread)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._prepare()
        except BaseException as raised:
            error = raised
            log.exception("%s: unplug_requested() failed", self._name)
        if self._thread is threading.current_thread():
            self._ask()
        self._left.returned(error)

    def _ask(self) -> None:
        try:
            self._let_go()
        except OfferRefused as refused:
            lost = refused.status == NtStatus.DEVICE_NOT_CONNECTED
            log.log(logging.INFO if lost else logging.ERROR, "%s: %s", self._name, refused)
