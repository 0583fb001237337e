# SPDX-License-Identifier: GPL-2.0-or-later
"""A front end's hold on its back ends' in-flight region: the file, and what was said of it.

``docs/vhost-user-vmbus.md``, "Packets in flight".  Invariant: a back end is given
only what the one directly before it left; nothing is kept past one that does not record.
"""

from __future__ import annotations

import logging
import os

from vhostvmbus.guest.transport import Transport
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import RequestRefused
from vhostvmbus.vhost_user.messages import ProtocolFeature

log = logging.getLogger(__name__)


class KeptInflight:
    """The in-flight region that a front end keeps between back ends, if there is one."""

    def __init__(self) -> None:
        self.fd = -1
        """The file; -1: none."""
        self.reply: m.InflightReply | None = None
        """The description that the back end that made the region gave of it."""

    def share(self, front_end: Transport, channels: int) -> None:
        """Gives a new back end the region of the one before, or has it make one."""
        if ProtocolFeature.INFLIGHT_SHMFD not in front_end.features:
            self.forget()
            return
        reply = self.reply
        if reply is not None:
            message = m.SetInflightFd(
                reply.mmap_size, reply.mmap_offset, reply.num_queues, reply.queue_size
            )
            try:
                front_end.request(message, [self.fd])
                return
            except RequestRefused as error:
                log.warning("what was in flight is lost: %s", error)
                self.forget()
        answer, fds = front_end.request_with_fds(m.GetInflightFd(0, 0, channels, 0))
        if isinstance(answer, m.InflightReply) and fds:
            self.reply, self.fd = answer, fds[0]

    def forget(self) -> None:
        """Closes the region, so that the next back end makes one."""
        self.reply = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
