# SPDX-License-Identifier: GPL-2.0-or-later
"""Framing: bytes and descriptors ↔ messages, without I/O ("Message header").

A :class:`Decoder` reads one direction of one socket. It takes bytes in pieces of any length; a
message is checked as soon as its header is complete, so a wrong size is refused before a byte of
payload is waited for. Descriptors belong to the first byte of a header: a piece that brings some
has to begin with one. A reader that asks a stream socket for exactly :attr:`Decoder.wanted` bytes
each time keeps to that.

Invariant: every descriptor that was fed is, at any moment, either handed out with a frame or in
:meth:`Decoder.release_fds`. The codec closes none.
"""

from __future__ import annotations

import enum
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from vhostvmbus.vhost_user import messages
from vhostvmbus.vhost_user.errors import (
    BadFlags,
    BadVersion,
    Oversized,
    Truncated,
    UnknownRequest,
    WrongFds,
)
from vhostvmbus.vhost_user.messages import MAX_PAYLOAD, Message

HEADER = struct.Struct("<III")

VERSION = 1
"""The version in a header's flags."""
VERSION_MASK = 3
REPLY = 1 << 2
NEED_REPLY = 1 << 3

MAX_FDS = messages.MAX_TABLE_REGIONS
"""The most descriptors that any message carries."""


class Direction(enum.Enum):
    """One of the four ways that a message can travel: two on each of the two sockets."""

    REQUESTS = "front-end requests"
    """From front end to back end on the main socket: requests."""
    REPLIES = "back-end replies"
    """From back end to front end on the main socket: replies."""
    BACKEND_REQUESTS = "back-end requests"
    """From back end to front end on the back-end channel: requests."""
    BACKEND_REPLIES = "front-end replies"
    """From front end to back end on the back-end channel: replies."""

    @property
    def is_reply(self) -> bool:
        """Tells whether the reply bit has to be set in this direction."""
        return self in (Direction.REPLIES, Direction.BACKEND_REPLIES)

    @property
    def registry(self) -> dict[int, type[Message]]:
        """The messages of this direction by their number."""
        return _REGISTRIES[self]


_REGISTRIES = {
    Direction.REQUESTS: messages.FRONT_END_REQUESTS,
    Direction.REPLIES: messages.BACK_END_REPLIES,
    Direction.BACKEND_REQUESTS: messages.BACK_END_REQUESTS,
    Direction.BACKEND_REPLIES: messages.FRONT_END_REPLIES,
}


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded message: who gets a frame owns its descriptors.

    ``request`` is the number in the header, without which one bare ``u64`` reply looks like
    another.
    """

    request: int
    message: Message
    need_reply: bool
    fds: tuple[int, ...]


def encode(message: Message, *, request: int | None = None, flags: int = 0) -> bytes:
    """Returns header and payload of ``message``.

    ``request`` replaces the message's own number (for :class:`~.messages.Value`, which answers any
    request); ``flags`` are ORed to the version: :data:`REPLY` or :data:`NEED_REPLY`.
    """
    payload = message.pack()
    number = message.REQUEST if request is None else request
    return HEADER.pack(number, VERSION | flags, len(payload)) + payload


@dataclass(frozen=True, slots=True)
class _Header:
    request: int
    kind: type[Message]
    need_reply: bool
    size: int


class Decoder:
    """An incremental decoder of one direction of one socket."""

    def __init__(self, direction: Direction) -> None:
        self.direction = direction
        self._buffer = bytearray()
        self._header: _Header | None = None
        self._fds: deque[tuple[int, tuple[int, ...]]] = deque()
        """The descriptors, with the stream offset of the byte that they came with."""
        self._start = 0  # stream offset of the first byte in the buffer

    @property
    def wanted(self) -> int:
        """The number of bytes that complete the present header or payload; 0: a frame is ready."""
        need = HEADER.size if self._header is None else HEADER.size + self._header.size
        return max(0, need - len(self._buffer))

    @property
    def in_message(self) -> bool:
        """Tells whether part of a message, or a descriptor without one, has come."""
        return bool(self._buffer or self._fds)

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Takes bytes that were read, and the descriptors that came with the first of them."""
        if fds:
            self._fds.append((self._start + len(self._buffer), tuple(fds)))
            if not data:
                raise WrongFds("descriptors without a byte", field="fds", value=len(fds))
        self._buffer += data

    def next_frame(self) -> Frame | None:
        """Returns the next complete message, or ``None`` when more bytes are wanted.

        Raises a :class:`~.errors.ProtocolError` at the first thing that is wrong; the stream cannot
        be read any further then.
        """
        if self._header is None:
            if len(self._buffer) < HEADER.size:
                self._check_stray_fds(self._start + len(self._buffer))
                return None
            self._header = self._read_header()
        header = self._header
        end = HEADER.size + header.size
        self._check_stray_fds(self._start + min(end, len(self._buffer)))
        if len(self._buffer) < end:
            return None
        message = header.kind.parse(bytes(self._buffer[HEADER.size : end]))
        count = self._fd_count()
        if not message.check_fds(count):
            raise WrongFds(
                f"{header.kind.__name__} came with the wrong number of descriptors",
                field="fds",
                value=count,
            )
        fds = self._fds.popleft()[1] if count else ()
        del self._buffer[:end]
        self._start += end
        self._header = None
        return Frame(header.request, message, header.need_reply, fds)

    def end(self) -> None:
        """Notes that the stream ended. Raises :class:`Truncated` if that was inside a message."""
        if self.in_message:
            raise Truncated(
                f"the connection ended inside a message ({self.direction.value})",
                field="received",
                value=len(self._buffer),
            )

    def release_fds(self) -> list[int]:
        """Hands over the descriptors of messages that were never handed out."""
        fds = [fd for _, group in self._fds for fd in group]
        self._fds.clear()
        return fds

    def _fd_count(self) -> int:
        return len(self._fds[0][1]) if self._fds and self._fds[0][0] == self._start else 0

    def _check_stray_fds(self, end: int) -> None:
        """Checks that no descriptor came between the present header's first byte and ``end``."""
        for offset, group in self._fds:
            if self._start < offset < end:
                raise WrongFds(
                    "descriptors came away from a header's first byte",
                    field="fds",
                    value=len(group),
                )

    def _read_header(self) -> _Header:
        request, flags, size = HEADER.unpack_from(self._buffer)
        if flags & VERSION_MASK != VERSION:
            raise BadVersion("only version 1 is known", field="version", value=flags & VERSION_MASK)
        if flags & ~(VERSION_MASK | REPLY | NEED_REPLY):
            raise BadFlags("undefined flag bits in a header", field="flags", value=flags)
        if bool(flags & REPLY) != self.direction.is_reply:
            raise BadFlags(
                f"the reply bit is the wrong way round among {self.direction.value}",
                field="flags",
                value=flags,
            )
        if size > MAX_PAYLOAD:
            raise Oversized(f"a payload is at most {MAX_PAYLOAD} bytes", field="size", value=size)
        kind = self.direction.registry.get(request)
        if kind is None:
            raise UnknownRequest(
                f"no such message among {self.direction.value}", field="request", value=request
            )
        kind.check_size(size)
        count = self._fd_count()
        if not kind.FDS[0] <= count <= kind.FDS[1]:
            raise WrongFds(
                f"{kind.__name__} carries {kind.FDS[0]} to {kind.FDS[1]} descriptors",
                field="fds",
                value=count,
            )
        # A reply may echo the need-reply bit of its request; it asks for nothing.
        return _Header(request, kind, bool(flags & NEED_REPLY) and not flags & REPLY, size)
