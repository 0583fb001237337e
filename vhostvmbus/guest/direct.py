# SPDX-License-Identifier: GPL-2.0-or-later
"""A front end that calls a back end in this process: no socket, no thread, no bytes.

It refuses what a session would refuse, with the same statuses, so that a guest cannot tell the
two transports apart by what it is answered.  What would end a session, a
:class:`~vhostvmbus.vhost_user.errors.ProtocolError`, is raised at the caller.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence

from vhostvmbus.guest.transport import BackEndRequestHandler, serve_request
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.backchannel import BackEndRequests, set_requests
from vhostvmbus.vhost_user.backend import BackEnd
from vhostvmbus.vhost_user.carry_out import carry_out, make_inflight, name_of, status_of
from vhostvmbus.vhost_user.errors import (
    Disconnected,
    FeatureMissing,
    ProtocolError,
    RequestRefused,
)
from vhostvmbus.vhost_user.limits import ConnectionLimits
from vhostvmbus.vhost_user.memory_table import MemoryTable
from vhostvmbus.vhost_user.messages import ProtocolFeature, Request
from vhostvmbus.vhost_user.session import NEEDS_FEATURE, OPTIONAL_FEATURES, State, next_state
from vhostvmbus.vhost_user.sockets import close_all
from vhostvmbus.wire.errors import MemoryInUse, VmbusError
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.offer import Offer

log = logging.getLogger(__name__)


class DirectFrontEnd:
    """One connection with ``back_end``, which has no other while it lasts.

    A request is carried out on the thread that makes it, one at a time.  ``handler`` serves
    back-end requests on the thread of the back end that asks, one at a time as well; it must not
    make requests itself, and has to return before :meth:`close` can.
    """

    def __init__(
        self, back_end: BackEnd, features: ProtocolFeature, handler: BackEndRequestHandler
    ) -> None:
        self._back_end = back_end
        self._wanted = features
        self._features = ProtocolFeature(0)
        self._limits = ConnectionLimits()
        self._table = MemoryTable(self._limits.mem_slots)
        self._back_end_requests = _BackEndRequests(handler)
        self._lock = threading.Lock()
        self._closed = False

    @property
    def features(self) -> ProtocolFeature:
        """The protocol features that are set."""
        return self._features

    def negotiate(self) -> Offer:
        """Takes the features and the offer, and lets the back end make requests."""
        with self._lock:
            self._features = m.REQUIRED_FEATURES | (self._wanted & OPTIONAL_FEATURES)
            set_requests(self._back_end, self._back_end_requests)
            self._back_end.connected()
            return self._back_end.offer()

    def request(self, message: m.Message, fds: Sequence[int] = ()) -> m.Message:
        """Has a request carried out; ``fds`` stay the caller's.

        Raises :class:`RequestRefused` for a non-zero status, :class:`Disconnected` once closed.
        """
        answer, received = self.request_with_fds(message, fds)
        close_all(received)
        return answer

    def request_with_fds(
        self, message: m.Message, fds: Sequence[int] = ()
    ) -> tuple[m.Message, tuple[int, ...]]:
        """Does :meth:`request`, and returns the answer's descriptors, which are the caller's."""
        self._check(message, len(fds))
        # As over a socket, the back end has descriptors of its own for as long as it is called.
        carried = [os.dup(fd) for fd in fds]
        try:
            with self._lock:
                if self._closed:
                    raise Disconnected("the front end has left")
                if isinstance(message, m.GetInflightFd):
                    reply, made = make_inflight(self._back_end, message.num_queues)
                    return reply, tuple(os.dup(fd) for fd in made)
                status = self._carry_out(message, carried)
        finally:
            close_all(carried)
        if status:
            raise RequestRefused(type(message).__name__, status & 0xFFFFFFFF)
        return m.Value(status), ()

    def close(self) -> None:
        """Leaves: the back end forgets all that came from here, and can ask for nothing more."""
        self._back_end_requests.end()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            try:
                self._back_end.disconnect()
            finally:
                set_requests(self._back_end, None)

    def _check(self, message: m.Message, fd_count: int) -> None:
        """Raises for what a front end's session does not send either."""
        if not message.check_fds(fd_count):
            raise ValueError(f"{type(message).__name__} does not carry {fd_count} descriptors")
        request = Request(message.REQUEST)
        next_state(State.READY, request)
        feature = NEEDS_FEATURE.get(request)
        if feature is not None and feature not in self._features:
            raise FeatureMissing(
                f"{request.name} without {feature.name} set", field="request", value=int(request)
            )

    def _carry_out(self, message: m.Message, fds: Sequence[int]) -> NtStatus:
        refusal = self._limits.refusal(message) or self._table.refusal(message)
        if refusal is not None:
            log.warning("%s refused: %s", name_of(message), refusal.reason)
            return refusal.status
        assert isinstance(message, m.DeviceWork)
        try:
            carry_out(self._back_end, message, fds)
        except (ProtocolError, MemoryInUse):
            raise
        except (VmbusError, OSError) as error:
            return status_of(error, message)
        self._table.enter(message)
        return NtStatus.SUCCESS


class _BackEndRequests(BackEndRequests):
    """Gives a back end's requests to the front end's handler."""

    def __init__(self, handler: BackEndRequestHandler) -> None:
        self._handler = handler
        self._lock = threading.Lock()
        self._ended = False

    def request(self, message: m.Message) -> None:
        """Has ``message`` served.  Raises :class:`RequestRefused`, :class:`Disconnected`."""
        with self._lock:
            if self._ended:
                raise Disconnected("the front end has left")
            status = serve_request(self._handler, message)
        if status:
            raise RequestRefused(type(message).__name__, status)

    def end(self) -> None:
        """Fails every request that is made from now on."""
        self._ended = True
