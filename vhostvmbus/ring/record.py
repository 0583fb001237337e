# SPDX-License-Identifier: GPL-2.0-or-later
"""A ring's record of its packets in flight: what :class:`~vhostvmbus.ring.Ring` has of it.

The region that it is in is ``inflight.py``'s business; what is in it, and why that is right at
every moment, is in ``inflight.c``.
"""

import errno
import os
from typing import TYPE_CHECKING

from vhostvmbus.engine import ffi, lib
from vhostvmbus.wire.errors import InflightInvalid

if TYPE_CHECKING:
    from vhostvmbus._engine import Pointer, vvb_ring


class Recording:
    """The part of a ring that is about its record."""

    _ring: "Pointer[vvb_ring]"

    def _check_open(self) -> None:
        """Raises :exc:`ChannelClosed` once the ring is detached."""
        raise NotImplementedError

    def record(self, fd: int, offset: int, size: int, slots: int, *, resume: bool) -> None:
        """Records packets that want a completion, from when they are taken until it is published.

        In ``size`` bytes of ``fd`` at ``offset``, which nobody else may use. Before anything is
        received or sent, once. With ``resume``, what is recorded there is received first. Raises
        :exc:`InflightInvalid` if the part has no such size, or is not what this ring left; the
        ring goes on without then.
        """
        self._check_open()
        result = lib.vvb_ring_record(self._ring, fd, offset, size, slots, resume)
        if result == -errno.EBADMSG:
            raise InflightInvalid("what is in the in-flight region makes no sense")
        if result == -errno.ESTALE:
            raise InflightInvalid("the in-flight region is not about this ring")
        if result:
            raise InflightInvalid(f"the in-flight region: {os.strerror(-result)}")

    @property
    def note(self) -> bytes:
        """What was kept in the record, by this back end or the one before; empty without one."""
        self._check_open()
        data = ffi.new("char[]", lib.VVB_NOTE_BYTES)
        length = lib.vvb_ring_get_note(self._ring, data)
        return bytes(ffi.buffer(data, length))

    @note.setter
    def note(self, data: bytes) -> None:
        self._check_open()
        if len(data) > lib.VVB_NOTE_BYTES:
            raise ValueError(f"a note has at most {lib.VVB_NOTE_BYTES} bytes")
        lib.vvb_ring_keep_note(self._ring, data, len(data))

    @property
    def to_replay(self) -> int:
        """Recorded packets that have not been received again."""
        self._check_open()
        return int(lib.vvb_ring_to_replay(self._ring))

    @property
    def has_slot(self) -> bool:
        """Whether one packet more can be recorded; for the thread that receives."""
        self._check_open()
        return bool(lib.vvb_ring_has_slot(self._ring))
