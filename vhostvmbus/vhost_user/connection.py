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
from typing import assert_never

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.backchannel import ANSWER_TIMEOUT, BackChannel
from vhostvmbus.vhost_user.backend import BackEnd
from vhostvmbus.vhost_user.errors import Disconnected, OutOfOrder, ProtocolError
from vhostvmbus.vhost_user.gpadl import read_list
from vhostvmbus.vhost_user.limits import ConnectionLimits
from vhostvmbus.vhost_user.session import BackEndSession, Call, Refused
from vhostvmbus.vhost_user.sockets import (
    close_all,
    receive,
    require_eventfd,
    require_stream_socket,
    send,
)
from vhostvmbus.wire.errors import FrontEndError, GuestError, RefuseOpen, VmbusError
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.regions import SharedRegion

log = logging.getLogger(__name__)

#: Bytes of answers the peer may leave unread before it is taken as gone (seconds to drain).
SEND_TIMEOUT = 10.0


class Connection:
    """A session with one front end on `sock` (which stays the caller's).

    `wake_fd` becoming readable ends :meth:`run` between two requests.
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
        """Serve until the front end leaves or `wake_fd` wakes.

        Raises :class:`~.errors.ProtocolError` when the front end breaks the protocol.  In any
        case the back end has been told to forget the connection, and every descriptor that
        came over it is closed.
        """
        try:
            self._serve()
        except Disconnected as error:
            log.info("%s", error)
        finally:
            offers = self._back_end.offers
            close_all(self.session.release_fds())
            # First wake a worker that waits for an answer, then wait for the workers.
            if self._back_channel is not None:
                self._back_channel.shut_down()
            try:
                self._back_end.disconnect()
            finally:
                self._back_end.invalidate = None
                offers.offer_channel = offers.rescind_channel = None
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
        name = type(event.message).__name__
        if isinstance(event.message, m.Open):
            name += f" of channel {event.message.opening.index}"
        if isinstance(event, Refused):
            log.warning("%s refused: %s", name, event.refusal.reason)
            return
        if isinstance(event.message, m.GetInflightFd):
            self._make_inflight(event, event.message.num_queues)
            return
        status = NtStatus.SUCCESS
        try:
            self._carry_out(event)
        except ProtocolError:
            raise
        except (FrontEndError, RefuseOpen) as error:
            log.warning("%s refused: %s", name, error)
            status = error.status
        except GuestError as error:
            log.warning("%s refused: %s", name, error)
            status = NtStatus.INVALID_PARAMETER
        except (VmbusError, OSError):
            log.exception("%s failed", name)
            status = NtStatus.UNSUCCESSFUL
        self.session.answer(event, status)

    def _make_inflight(self, call: Call, channels: int) -> None:
        self._flush()  # descriptors go with the first byte
        try:
            region = self._back_end.make_inflight(channels)
        except (FrontEndError, OSError) as error:
            log.error("no in-flight region: %s", error)
            self.session.reply(call, m.InflightReply(0, 0, 0, 0))
            return
        answer = m.InflightReply(region.size, region.offset, region.channels, region.slots)
        self.session.reply(call, answer)
        self._flush([region.fd])

    def _carry_out(self, call: Call) -> None:
        back_end, message = self._back_end, call.message
        if not isinstance(message, m.BackEndWork):
            raise OutOfOrder(
                "the session lets a request through that nobody carries out",
                field="request",
                value=message.REQUEST,
            )
        match message:
            case m.SetBackendReqFd():
                self._set_back_channel(call.fds[0])
            case m.AddMemReg(region):
                back_end.add_region(*_shared(region, call.fds[0]))
            case m.RemMemReg(region):
                back_end.remove_region(region.guest_phys_addr, region.size)
            case m.SetMemTable(regions):
                back_end.set_memory_table(
                    [_shared(region, fd) for region, fd in zip(regions, call.fds, strict=True)]
                )
            case m.GpadlCreate(channel, gpadl_id, range_count, range_bytes):
                ranges = read_list(call.fds[0], range_count, range_bytes)
                back_end.gpadl_create(channel, gpadl_id, ranges)
            case m.GpadlTeardown(channel, gpadl_id):
                back_end.gpadl_teardown(channel, gpadl_id)
            case m.Open(opening):
                kick, call_fd = call.fds
                require_eventfd(kick, "kick")
                require_eventfd(call_fd, "call")
                back_end.open_channel(opening, kick, call_fd)
            case m.Close(channel):
                back_end.close_channel(channel)
            case m.Modify(channel, target_vp):
                back_end.modify_channel(channel, target_vp)
            case m.SetInflightFd(size, offset, channels, slots):
                back_end.adopt_inflight(call.fds[0], size, offset, channels, slots)
            case m.Reset():
                back_end.reset()
            case m.Unplug():
                back_end.unplug()
            case m.SetCodeMap(map_bytes, regions):
                where = [(item.guest_phys_addr, item.size, item.first_bit) for item in regions]
                back_end.set_code_map(call.fds[0], map_bytes, where)
            case _:
                assert_never(message)

    def _set_back_channel(self, fd: int) -> None:
        sock = require_stream_socket(fd, "backend_req_fd")
        self._back_channel = BackChannel(sock, self._back_channel_failed, self._answer_timeout)
        self._back_end.invalidate = self._back_channel.invalidate
        self._back_end.offers.offer_channel = self._back_channel.offer_channel
        self._back_end.offers.rescind_channel = self._back_channel.rescind_channel

    def _back_channel_failed(self, error: VmbusError) -> None:
        # Called in a worker's thread.  Without invalidation nothing can be completed, so the
        # session ends: reading the socket sees its end.
        level = logging.INFO if isinstance(error, Disconnected) else logging.ERROR
        log.log(level, "the session ends: %s", error)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def _shared(region: m.MemoryRegion, fd: int) -> SharedRegion:
    return SharedRegion(region.guest_phys_addr, region.size, fd, region.mmap_offset)
