# SPDX-License-Identifier: GPL-2.0-or-later
"""Back-end requests, and the socket passed with ``SET_BACKEND_REQ_FD``, seen from the back end.

:meth:`BackChannel.request` may be called from any thread; requests go out one at
a time, each waiting for its answer. Once a request has failed (no answer in time, broken
protocol, connection gone) every later one fails at once: nobody could tell any more which
answer belongs to what.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.backend import BackEnd
from vhostvmbus.vhost_user.codec import NEED_REPLY, Decoder, Direction, encode
from vhostvmbus.vhost_user.errors import (
    BackChannelTimeout,
    Disconnected,
    RequestRefused,
    UnexpectedReply,
)
from vhostvmbus.vhost_user.sockets import close_all, receive_before, send_before
from vhostvmbus.wire.errors import OfferRefused, VmbusError
from vhostvmbus.wire.ntstatus import NtStatus

ANSWER_TIMEOUT = 10.0
"""Seconds that the front end has for an answer."""


class BackEndRequests(ABC):
    """The requests that a back end may make of its front end; a subclass knows the way there."""

    @abstractmethod
    def request(self, message: m.Message) -> None:
        """Sends ``message`` and waits for its answer.

        Raises :class:`RequestRefused` for a non-zero status, and another
        :class:`~vhostvmbus.wire.errors.VmbusError` when the front end cannot be asked.
        """

    def invalidate(self, ranges: list[tuple[int, int]]) -> None:
        """Has all translations of these ``(guest_phys_addr, size)`` ranges discarded.

        Takes any number of ranges, and returns when the front end has discarded their translations.
        """
        for start in range(0, len(ranges), m.MAX_INVALIDATE_RANGES):
            part = ranges[start : start + m.MAX_INVALIDATE_RANGES]
            self.request(m.InvalidateCode(tuple(part)))

    def offer_channel(self, index: int) -> None:
        """Has the front end offer channel ``index``; 0 means the device.

        Returns when the front end has taken note. Raises :class:`OfferRefused`.
        """
        self._change(m.OfferChannel(index))

    def rescind_channel(self, index: int) -> None:
        """Has the front end rescind channel ``index``; otherwise as :meth:`offer_channel`."""
        self._change(m.RescindChannel(index))

    def _change(self, message: m.OfferChannel | m.RescindChannel) -> None:
        try:
            self.request(message)
        except RequestRefused as error:
            raise OfferRefused(str(error), error.status) from error
        except VmbusError as error:
            raise OfferRefused(str(error), NtStatus.DEVICE_NOT_CONNECTED) from error


def set_requests(back_end: BackEnd, requests: BackEndRequests | None) -> None:
    """Has ``back_end`` ask its front end through ``requests``; ``None``: there is nobody to ask."""
    offers = back_end.offers
    if requests is None:
        back_end.invalidate = offers.offer_channel = offers.rescind_channel = None
        return
    back_end.invalidate = requests.invalidate
    offers.offer_channel = requests.offer_channel
    offers.rescind_channel = requests.rescind_channel


class BackChannel(BackEndRequests):
    """The back end's side of the back-end channel; owns ``sock``.

    ``on_failure`` is called once, from the thread whose request failed.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_failure: Callable[[VmbusError], None] = lambda _: None,
        timeout: float = ANSWER_TIMEOUT,
    ) -> None:
        self._sock = sock
        self._on_failure = on_failure
        self._timeout = timeout
        self._lock = threading.Lock()
        self._decoder = Decoder(Direction.BACKEND_REPLIES)
        self._failure: VmbusError | None = None

    def request(self, message: m.Message) -> None:
        """Sends ``message`` and waits for its answer.

        Raises :class:`RequestRefused` for a non-zero status, after which the channel stays usable.
        Raises :class:`BackChannelTimeout`, :class:`Disconnected` or a
        :class:`~.errors.ProtocolError`, after which it does not.
        """
        with self._lock:
            if self._failure is not None:
                raise Disconnected("the back-end channel is gone") from self._failure
            try:
                status = self._exchange(message)
            except VmbusError as error:
                self._failure = error
                self._on_failure(error)
                raise
        if status:
            raise RequestRefused(type(message).__name__, status)

    def shut_down(self) -> None:
        """Wakes whoever waits for an answer; may be called from any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Closes the socket; a request that waits for its answer fails first."""
        self.shut_down()
        with self._lock:
            self._failure = self._failure or Disconnected("the back-end channel was closed")
            close_all(self._decoder.release_fds())
            self._sock.close()

    def _exchange(self, message: m.Message) -> int:
        name = type(message).__name__
        deadline = time.monotonic() + self._timeout
        try:
            send_before(self._sock, encode(message, flags=NEED_REPLY), deadline)
            while (frame := self._decoder.next_frame()) is None:
                data, fds = receive_before(self._sock, self._decoder.wanted, deadline)
                if not data:
                    self._decoder.end()
                    raise Disconnected(f"the front end left before it answered {name}")
                self._decoder.feed(data, fds)
        except TimeoutError:
            raise BackChannelTimeout(
                f"the front end did not answer {name} in {self._timeout:g} s"
            ) from None
        except OSError as error:
            raise Disconnected(f"the back-end channel broke during {name}: {error}") from error
        if frame.request != message.REQUEST:
            raise UnexpectedReply(
                f"a reply to something other than {name}", field="request", value=frame.request
            )
        assert isinstance(frame.message, m.Value)
        return frame.message.value & 0xFFFFFFFF
