# SPDX-License-Identifier: GPL-2.0-or-later
"""One front end's connection, from its first byte to its last: the session on a socket.

Requests are carried out one after the other in the thread that calls
:meth:`Connection.run`.  While one of them waits for a channel's worker (a close, say), that
worker may still have code invalidated: it waits for the answer by itself, in
:class:`~.backchannel.BackChannel`.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
from collections.abc import Sequence

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.backchannel import ANSWER_TIMEOUT, BackChannel, set_requests
from vhostvmbus.vhost_user.backend import BackEnd
from vhostvmbus.vhost_user.carry_out import carry_out, make_inflight, name_of, status_of
from vhostvmbus.vhost_user.errors import Disconnected, OutOfOrder, ProtocolError
from vhostvmbus.vhost_user.limits import ConnectionLimits
from vhostvmbus.vhost_user.session import BackEndSession, Call, Refused
from vhostvmbus.vhost_user.sockets import (
    close_all,
    receive,
    require_stream_socket,
    send,
)
from vhostvmbus.wire.errors import MemoryInUse, VmbusError
from vhostvmbus.wire.ntstatus import NtStatus

log = logging.getLogger(__name__)

SEND_TIMEOUT = 10.0
"""The seconds after which a peer that does not read its answers is taken as gone."""


class Connection:
    """A session with one front end on ``sock`` (which stays the caller's).

    ``wake_fd`` becoming readable ends :meth:`run` between two requests.
    """

    def __init__(
        self,
        back_end: BackEnd,
        sock: socket.socket,
        wake_fd: int,
        *,
        limits: ConnectionLimits | None = None,
        answer_timeout: float = ANSWER_TIMEOUT,
    ) -> None:
        self._back_end = back_end
        self._sock = sock
        self._wake_fd = wake_fd
        self._answer_timeout = answer_timeout
        self._back_channel: BackChannel | None = None
        self.session = BackEndSession(m.OfferReply(back_end.offer()), limits=limits)

    def run(self) -> None:
        """Serves until the front end leaves or ``wake_fd`` wakes.

        Raises :class:`~.errors.ProtocolError` when the front end breaks the protocol.  In any
        case the back end has been told to forget the connection, and every descriptor that
        came over it is closed.
        """
        try:
            self._serve()
        except Disconnected as error:
            log.info("%s", error)
        finally:
            close_all(self.session.release_fds())
            # First wake a worker that waits for an answer, then wait for the workers.
            if self._back_channel is not None:
                self._back_channel.shut_down()
            try:
                self._back_end.disconnect()
            finally:
                set_requests(self._back_end, None)
                if self._back_channel is not None:
                    self._back_channel.close()

    def _serve(self) -> None:
        self._sock.settimeout(SEND_TIMEOUT)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._wake_fd in ready:
                return
            try:
                data, fds = receive(self._sock, self.session.wanted)
            except OSError as error:
                log.info("the front end's connection broke: %s", error)
                return
            if not data:
                close_all(fds)
                self.session.receive_end()
                return
            self.session.receive_data(data, fds)
            while (event := self.session.next_event()) is not None:
                try:
                    self._handle(event)
                finally:
                    close_all(event.fds)
                self._flush()
                if isinstance(event.message, m.SetBackendReqFd):
                    self._back_end.connected()
            self._flush()

    def _flush(self, fds: Sequence[int] = ()) -> None:
        """Sends what there is to send.  Raises :class:`Disconnected`."""
        data = self.session.data_to_send()
        try:
            if data:
                send(self._sock, data, fds)
        except OSError as error:
            raise Disconnected(f"the front end does not take answers: {error}") from error

    def _handle(self, event: Call | Refused) -> None:
        """Carries a request out and answers it."""
        message = event.message
        if isinstance(event, Refused):
            log.warning("%s refused: %s", name_of(message), event.refusal.reason)
            return
        if isinstance(message, m.GetInflightFd):
            self._flush()  # descriptors go with the first byte
            reply, fds = make_inflight(self._back_end, message.num_queues)
            self.session.reply(event, reply)
            self._flush(fds)
            return
        status = NtStatus.SUCCESS
        try:
            self._carry_out(message, event.fds)
        except (ProtocolError, MemoryInUse):
            raise
        except (VmbusError, OSError) as error:
            status = status_of(error, message)
        self.session.answer(event, status)

    def _carry_out(self, message: m.Message, fds: Sequence[int]) -> None:
        if isinstance(message, m.SetBackendReqFd):
            self._set_back_channel(fds[0])
        elif isinstance(message, m.DeviceWork):
            carry_out(self._back_end, message, fds)
        else:
            raise OutOfOrder(
                "the session lets a request through that nobody carries out",
                field="request",
                value=message.REQUEST,
            )

    def _set_back_channel(self, fd: int) -> None:
        sock = require_stream_socket(fd, "backend_req_fd")
        self._back_channel = BackChannel(sock, self._back_channel_failed, self._answer_timeout)
        set_requests(self._back_end, self._back_channel)

    def _back_channel_failed(self, error: VmbusError) -> None:
        # Called in a worker's thread.  Without invalidation nothing can be completed, so the
        # session ends: reading the socket sees its end.  The front end does not: to it that would
        # say that its memory is not touched any more.
        level = logging.INFO if isinstance(error, Disconnected) else logging.ERROR
        log.log(level, "the session ends: %s", error)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)
