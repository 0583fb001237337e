# SPDX-License-Identifier: GPL-2.0-or-later
"""The front end's end of the socket: requests out, answers in, back-end requests served.

The back-end channel has a thread of its own, so that ``INVALIDATE_CODE`` is served while a
request of this end waits for its answer, as ``docs/vhost-user-vmbus.md`` demands.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Sequence

from vhostvmbus.guest.transport import BackEndRequestHandler, serve_request
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import REPLY, Decoder, Direction, encode
from vhostvmbus.vhost_user.errors import Disconnected, ProtocolError, RequestRefused
from vhostvmbus.vhost_user.messages import ProtocolFeature
from vhostvmbus.vhost_user.session import QUERIES, FrontEndSession, Reply
from vhostvmbus.vhost_user.sockets import close_all, receive, receive_before, send
from vhostvmbus.wire.offer import Offer

log = logging.getLogger(__name__)

ANSWER_TIMEOUT = 10.0
"""Seconds that the back end has for an answer ("Negotiation")."""

HANG_UP_TIMEOUT = 10.0
"""Seconds that a back end gets to hang up after the front end has."""


class FrontEnd:
    """One connection; owns ``sock``.  :meth:`request` may be called from any thread.

    ``handler`` serves back-end requests, in the thread of the back-end channel.
    """

    def __init__(
        self,
        sock: socket.socket,
        features: ProtocolFeature,
        handler: BackEndRequestHandler,
        timeout: float = ANSWER_TIMEOUT,
    ) -> None:
        self._sock = sock
        self._handler = handler
        self._timeout = timeout
        self._lock = threading.Lock()
        self.session = FrontEndSession(features)
        self._mine, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(
            target=self._serve_back_end, name="front-end-back-channel", daemon=True
        )
        self._thread.start()

    def negotiate(self) -> Offer:
        """Does everything from ``GET_FEATURES`` to the offer, and returns the offer."""
        self.request(m.GetFeatures())
        self.request(m.GetProtocolFeatures())
        self.request(m.SetProtocolFeatures(int(self.session.wanted_features)))
        self.request(m.SetFeatures(m.F_PROTOCOL_FEATURES))
        self.request(m.SetOwner())
        self.request(m.SetBackendReqFd(), [self._theirs.fileno()])
        self._theirs.close()
        self.request(m.GetMaxMemSlots())
        answer = self.request(m.GetOffer())
        assert isinstance(answer, m.OfferReply)
        return answer.offer

    @property
    def features(self) -> ProtocolFeature:
        """The protocol features that are set."""
        return self.session.protocol_features

    def request(self, message: m.Message, fds: Sequence[int] = ()) -> m.Message:
        """Sends a request and waits for its answer.

        Raises :class:`RequestRefused` for a non-zero status, ``TimeoutError`` when there is
        no answer in time, :class:`Disconnected` when the back end has gone.
        """
        answer, received = self.request_with_fds(message, fds)
        close_all(received)
        return answer

    def request_with_fds(
        self, message: m.Message, fds: Sequence[int] = ()
    ) -> tuple[m.Message, tuple[int, ...]]:
        """Does :meth:`request`; returns also the answer's descriptors, which are the caller's."""
        with self._lock:
            reply = self._exchange(message, fds)
        answer = reply.message
        if message.REQUEST not in QUERIES and isinstance(answer, m.Value) and answer.value:
            raise RequestRefused(type(message).__name__, answer.value)
        return answer, reply.fds

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Sends bytes that no session has looked at, for tests of the other end."""
        send(self._sock, data, fds)

    def receive_raw(self, size: int = 4096, timeout: float = ANSWER_TIMEOUT) -> bytes:
        """Returns bytes from the back end, none when it has closed the connection."""
        data, fds = receive_before(self._sock, size, time.monotonic() + timeout)
        close_all(fds)
        return data

    def close(self, wait: float = HANG_UP_TIMEOUT) -> None:
        """Leaves, and waits up to ``wait`` seconds for the back end to close everything.

        It closes the connection when it no longer touches guest memory; only then may another
        back end be given the same rings.  Back-end requests are not answered any more.
        """
        with contextlib.suppress(OSError):
            self._mine.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError, ProtocolError):
            self._sock.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + wait
            while self._sock.fileno() >= 0:
                data, fds = receive_before(self._sock, 4096, deadline)
                close_all(fds)
                if not data:
                    break
        self._thread.join()
        for sock in (self._sock, self._mine, self._theirs):
            sock.close()

    def _exchange(self, message: m.Message, fds: Sequence[int]) -> Reply:
        name = type(message).__name__
        self.session.send(message, len(fds))
        deadline = time.monotonic() + self._timeout
        try:
            send(self._sock, self.session.data_to_send(), fds)
            while (reply := self.session.next_event()) is None:
                data, received = receive_before(self._sock, self.session.wanted, deadline)
                if not data:
                    raise Disconnected(f"the back end left before it answered {name}")
                self.session.receive_data(data, received)
        except TimeoutError:
            raise TimeoutError(f"no answer to {name} in {self._timeout:g} s") from None
        except OSError as error:
            raise Disconnected(f"the connection broke during {name}: {error}") from error
        finally:
            close_all(self.session.release_fds())
        return reply

    def _serve_back_end(self) -> None:
        decoder = Decoder(Direction.BACKEND_REQUESTS)
        try:
            while True:
                frame = decoder.next_frame()
                if frame is None:
                    data, fds = receive(self._mine, decoder.wanted)
                    if not data:
                        return
                    decoder.feed(data, fds)
                    continue
                close_all(frame.fds)
                status = serve_request(self._handler, frame.message)
                if frame.need_reply:
                    send(self._mine, encode(m.Value(status), request=frame.request, flags=REPLY))
        except ProtocolError as error:
            log.error("the back end broke the protocol: %s", error)
        except OSError:
            return
        finally:
            close_all(decoder.release_fds())
            with contextlib.suppress(OSError):
                self._mine.shutdown(socket.SHUT_RDWR)
