# SPDX-License-Identifier: GPL-2.0-or-later
"""The way of a software guest to its back end: a socket, or a call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.messages import ProtocolFeature
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.offer import Offer

log = logging.getLogger(__name__)

BackEndRequestHandler = Callable[[m.Message], int]
"""Serves a back-end request and returns the status that answers it."""


class Transport(Protocol):
    """One connection of a front end with a back end.  Requests may be made on any thread."""

    @property
    def features(self) -> ProtocolFeature:
        """The protocol features that are set."""

    def negotiate(self) -> Offer:
        """Does everything that comes before guest memory, and returns what is offered."""

    def request(self, message: m.Message, fds: Sequence[int] = ()) -> m.Message:
        """Makes a request, with descriptors that stay the caller's, and returns the answer.

        Raises :class:`RequestRefused` for a non-zero status, :class:`Disconnected` when the back
        end is not there any more.
        """

    def request_with_fds(
        self, message: m.Message, fds: Sequence[int] = ()
    ) -> tuple[m.Message, tuple[int, ...]]:
        """Does :meth:`request`, and returns the answer's descriptors, which are the caller's."""

    def close(self) -> None:
        """Leaves.  When it returns, the back end touches nothing of the guest's any more."""


def serve_request(handler: BackEndRequestHandler, message: m.Message) -> int:
    """Returns the status with which ``handler`` answers a back-end request, whatever it raises."""
    try:
        return handler(message)
    except Exception:
        log.exception("a back-end request failed")
        return NtStatus.UNSUCCESSFUL
