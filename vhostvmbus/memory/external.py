# SPDX-License-Identifier: GPL-2.0-or-later
"""External data: the guest pages that a packet (or a GPADL) describes, as one stretch of bytes.

Invariants: every access is checked against the length; nothing works after :meth:`close` (the
packet's completion); what was written is remembered, for translated code and the dirty log; the
regions behind it stay mapped as long as it is open or somebody is inside one of its methods.
"""

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Protocol

from vhostvmbus.engine import ffi, lib
from vhostvmbus.memory.lending import give_back
from vhostvmbus.wire.errors import ExternalDataClosed, ExternalDataReadOnly, GuestMemoryLost
from vhostvmbus.wire.gpa import GpaRange

if TYPE_CHECKING:
    from vhostvmbus._engine import Array, Pointer, vvb_region, vvb_seg

_new_bytes = ffi.new_allocator(should_clear_after_alloc=False)

_POLL_SECONDS = 0.005
"""Seconds between two looks at a view that is in use."""
SEG_SIZE: int = ffi.sizeof("struct vvb_seg")


class MappedMemory(Protocol):
    """The part of the guest memory that external data needs."""

    def view_of(
        self, region: "Pointer[vvb_region]", guest_phys_addr: int, length: int
    ) -> memoryview:
        """Returns a view of memory in a region of the engine's that is in use."""


class ExternalData:
    """Guest memory described by GPA ranges, joined to one stretch of ``len(self)`` bytes.

    Made by :meth:`GuestMemory.external_data` or by a ring, never directly. Thread-safe.
    ``offset`` and ``length`` are in bytes everywhere; ``length=None`` means up to the end.

    Errors of all accesses: :exc:`ValueError` out of bounds, :exc:`ExternalDataClosed` after the
    packet was completed, :exc:`GuestMemoryLost` if the guest's pages have gone.
    """

    __slots__ = (
        "_before_close",
        "_busy",
        "_closed",
        "_count",
        "_exported",
        "_kept_writable",
        "_length",
        "_lock",
        "_memory",
        "_on_idle",
        "_put",
        "_ranges",
        "_raw",
        "_views",
        "_written",
    )

    def __init__(
        self,
        memory: MappedMemory,
        raw_segs: bytes,
        length: int,
        ranges: Callable[[], list[GpaRange]] | None = None,
        written: int = 0,
    ) -> None:
        """Counts ``written`` bytes at the start as written already."""
        self._memory = memory
        self._raw = raw_segs
        self._count = len(raw_segs) // SEG_SIZE
        self._length = length
        self._ranges = ranges
        self._lock = threading.Lock()
        self._before_close: Callable[[], None] | None = None
        self._busy = 0
        self._closed = False
        self._put = False
        # Most packets need none of these: lists are made when something goes into them.
        self._written: list[tuple[int, int]] | None = [(0, written)] if written else None
        self._kept_writable: list[tuple[int, int]] | None = None
        self._views: list[memoryview] | None = None
        self._exported: list[memoryview] | None = None
        self._on_idle: list[threading.Event] | None = None

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self._count} segments"
        return f"<ExternalData {self._length} bytes, {state}>"

    def __enter__(self) -> "ExternalData":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._put:
            self._put = True
            lib.vvb_segs_put(self._raw, self._count)

    @property
    def closed(self) -> bool:
        """Tells whether the packet was completed, so that nothing can be accessed any more."""
        return self._closed

    @property
    def ranges(self) -> list[GpaRange]:
        """The GPA ranges as the guest sent them."""
        if self._ranges is not None:
            return self._ranges()
        return []

    def lend(self, use: Callable[[bytes], None], before_close: Callable[[], None]) -> None:
        """Calls ``use`` with the segments, an array of the engine's ``struct vvb_seg``, for C.

        ``before_close`` is called, on any thread, when the data ends, and returns when the segments
        are used no more; that may be before this returns. There is one at a time. Raises
        :exc:`ExternalDataClosed`.
        """
        self._enter()  # until we leave, the segments are valid
        try:
            use(self._raw)
            with self._lock:
                closed = self._closed
                if not closed:
                    self._before_close = before_close
            if closed:
                before_close()
        finally:
            self._leave()

    @property
    def segments(self) -> list[tuple[int, int]]:
        """``(gpa, length)`` of every stretch that is contiguous in guest-physical addresses."""
        return [(seg.gpa, seg.len) for seg in self._segs()[0 : self._count]]

    def _segs(self) -> "Array[vvb_seg]":
        """Returns the segments, to look into; the engine takes the bytes as they are."""
        return ffi.from_buffer("struct vvb_seg[]", self._raw)

    # -- access --------------------------------------------------------------------------------

    def _bounds(self, offset: int, length: int | None) -> int:
        if length is None:
            length = self._length - offset
        if offset < 0 or length < 0 or offset + length > self._length:
            raise ValueError(
                f"{length} bytes at {offset} are outside external data of {self._length} bytes"
            )
        return length

    def _enter(self, written: tuple[int, int] | None = None) -> list[tuple[int, int]] | None:
        """Enters; returns the notes of what is written.

        What will be is ``written``: a packet that is completed meanwhile counts it. If these are
        not the notes any more afterwards, :meth:`_written_to` is due.
        """
        with self._lock:
            if self._closed:
                raise ExternalDataClosed("external data is used after its packet's completion")
            self._busy += 1
            if written is not None:
                self._note_written(*written)
            return self._written

    def _written_to(self, offset: int, length: int) -> None:
        """Notes once more what has been written, for when the notes were taken while it was."""
        with self._lock:
            self._note_written(offset, length)

    def _leave(self) -> None:
        with self._lock:
            self._busy -= 1
            if self._busy or not self._closed:
                return
            waiting, self._on_idle = self._on_idle, None
        self._release()
        for event in waiting or ():
            event.set()

    def _note_written(self, offset: int, length: int) -> None:
        """Notes that bytes are written; the lock is held."""
        written = self._written
        if written is None:
            written = self._written = []
        if not length:
            return
        if written:
            last_offset, last_length = written[-1]
            if last_offset + last_length == offset:
                written[-1] = (last_offset, last_length + length)
                return
            if last_offset <= offset and offset + length <= last_offset + last_length:
                return
            if len(written) >= 64:
                # Many small writes: one span over all of them says enough.
                low = min(start for start, _ in written)
                high = max(start + size for start, size in written)
                written[:] = [(low, high - low)]
        written.append((offset, length))

    def _lost(self) -> GuestMemoryLost:
        return GuestMemoryLost("memory", self._segs()[0].gpa if self._count else 0)

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Returns a private copy of ``length`` bytes at ``offset``."""
        length = self._bounds(offset, length)
        self._enter()
        try:
            out = _new_bytes("char[]", length)
            if length and lib.vvb_ext_read(self._raw, self._count, offset, out, length):
                raise self._lost()
            return bytes(ffi.buffer(out, length))
        finally:
            self._leave()

    def read_into(self, buffer: bytearray | memoryview, offset: int = 0) -> int:
        """Copies ``len(buffer)`` bytes at ``offset`` into a writable buffer; returns how many."""
        target = ffi.from_buffer(buffer, require_writable=True)
        length = self._bounds(offset, len(target))
        self._enter()
        try:
            if length and lib.vvb_ext_read(self._raw, self._count, offset, target, length):
                raise self._lost()
            return length
        finally:
            self._leave()

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Copies all of ``data`` to ``offset``; returns its length."""
        source = ffi.from_buffer(data)
        length = self._bounds(offset, len(source))
        noted = self._enter((offset, length))
        try:
            if length and lib.vvb_ext_write(self._raw, self._count, offset, source, length):
                raise self._lost()
            return length
        finally:
            if self._written is not noted:
                self._written_to(offset, length)
            self._leave()

    def fill(self, byte: int = 0, offset: int = 0, length: int | None = None) -> int:
        """Sets ``length`` bytes at ``offset`` to ``byte``; returns how many."""
        length = self._bounds(offset, length)
        noted = self._enter((offset, length))
        try:
            if length and lib.vvb_ext_fill(self._raw, self._count, offset, byte & 0xFF, length):
                raise self._lost()
            return length
        finally:
            if self._written is not noted:
                self._written_to(offset, length)
            self._leave()

    def views(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        writable: bool = False,
        noted: bool = True,
    ) -> list[memoryview]:
        """Returns zero-copy views of the guest's pages, in order; the guest may change them.

        A writable view counts as written whole; with ``noted`` false it does not, and whoever
        writes says so where the guest is told (``written`` of :meth:`Channel.send`). Views end
        with the packet's completion.
        """
        length = self._bounds(offset, length)
        self._enter()
        try:
            if self._count and lib.vvb_ext_lost(self._raw, self._count):
                raise self._lost()
            views = []
            position, left = 0, length
            for seg in self._segs()[0 : self._count]:
                skip = max(0, offset - position)
                position += seg.len
                if skip >= seg.len or not left:
                    continue
                size = min(seg.len - skip, left)
                view = self._memory.view_of(seg.region, seg.gpa + skip, size)
                views.append(view if writable else view.toreadonly())
                left -= size
            with self._lock:
                if writable and noted:
                    self._note_written(offset, length)
                    if self._kept_writable is None:
                        self._kept_writable = []
                    if length and (offset, length) not in self._kept_writable:
                        self._kept_writable.append((offset, length))
                self._views = [*(self._views or ()), *views]
            return views
        finally:
            self._leave()

    def preadv(self, fd: int, file_offset: int, offset: int = 0, length: int | None = None) -> int:
        """Reads from a file straight into the guest's pages.

        Returns the bytes read: ``length``, or fewer at the end of the file or when an error came
        after some bytes (asking for the rest raises it). :exc:`OSError` if nothing was read.
        """
        return self._file_io(lib.vvb_ext_preadv, fd, file_offset, offset, length, True)

    def pwritev(self, fd: int, file_offset: int, offset: int = 0, length: int | None = None) -> int:
        """Writes the guest's pages straight to a file; otherwise like :meth:`preadv`."""
        return self._file_io(lib.vvb_ext_pwritev, fd, file_offset, offset, length, False)

    def _file_io(
        self,
        function: Callable[[bytes, int, int, int, int, int], int],
        fd: int,
        file_offset: int,
        offset: int,
        length: int | None,
        writes_guest: bool,
    ) -> int:
        length = self._bounds(offset, length)
        if not 0 <= file_offset <= (1 << 63) - 1 - length:
            raise ValueError(f"file offset {file_offset} is out of range")
        # Even a read that fails may have written some pages.
        noted = self._enter((offset, length) if writes_guest else None)
        try:
            done = function(self._raw, self._count, offset, length, fd, file_offset)
            if done < 0:
                if -done == 14:  # EFAULT: the pages have gone, the kernel does not raise SIGBUS
                    raise self._lost()
                raise OSError(-done, os.strerror(-done))
            return done
        finally:
            if writes_guest and self._written is not noted:
                self._written_to(offset, length)
            self._leave()

    # -- bookkeeping ---------------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        """Tells whether pages of the regions behind this data have vanished."""
        with self._lock:  # whoever ends it releases the regions after having held the lock
            return bool(not self._put and lib.vvb_ext_lost(self._raw, self._count))

    def lost_at_the_end(self) -> bool:
        """Does what :attr:`lost` does, for whoever alone can end it and has not."""
        return bool(lib.vvb_ext_lost(self._raw, self._count))

    @property
    def written(self) -> list[tuple[int, int]]:
        """The memory written so far, as ``(gpa, length)``; a writable view counts whole."""
        return self._spans(self._written)

    def take_written(self) -> list[tuple[int, int]]:
        """Returns :attr:`written` and starts over: for mappings that outlive many packets.

        Views that are writable and still in use are not forgotten, and a write that is under way
        is returned again by the next call, when it has been done.
        """
        with self._lock:
            written, self._written = self._written, list(self._kept_writable or ())
        return self._spans(written)

    def _spans(self, written: list[tuple[int, int]] | None) -> list[tuple[int, int]]:
        if not written:
            return []
        segments = self.segments
        spans: list[tuple[int, int]] = []
        for offset, length in written:
            position = 0
            end = offset + length
            for gpa, size in segments:
                low = max(offset, position)
                high = min(end, position + size)
                if low < high:
                    spans.append((gpa + low - position, high - low))
                position += size
                if position >= end:
                    break
        return spans

    def _release(self) -> None:
        with self._lock:
            views, self._views = self._views, None
            put, self._put = self._put, True
        for view in views or ():
            try:
                view.release()
            except BufferError:
                # Somebody made a view of the view, or is in a call with it. It keeps the mapping
                # alive.
                self._exported = [*(self._exported or ()), view]
        if not put:
            lib.vvb_segs_put(self._raw, self._count)

    def close(self, *, wait: bool = False) -> None:
        """Ends every access. With ``wait``, returns when nobody is inside a method any more."""
        with self._lock:
            self._closed = True
            before, self._before_close = self._before_close, None
            self._busy += before is not None  # the segments are valid until it has returned
        if before is not None:
            give_back(before)
            self._leave()
        with self._lock:
            busy = self._busy
        if wait:
            self._wait_idle(None)
        elif not busy:
            self._release()

    def _wait_idle(self, seconds: float | None) -> bool:
        """Waits until nobody is inside a method of what is closed."""
        event: threading.Event | None = None
        with self._lock:
            if self._busy:
                event = threading.Event()
                self._on_idle = [*(self._on_idle or ()), event]
        if event is None:
            self._release()
            return True
        return event.wait(seconds)

    def wait_unused(self, seconds: float) -> bool:
        """Returns whether, within so many seconds after :meth:`close`, nobody touches it any more.

        Who is inside a method still does, and who has a view of a view, or is in a call with one.
        """
        deadline = time.monotonic() + seconds
        if not self._wait_idle(seconds):
            return False
        while self._still_exported():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _still_exported(self) -> bool:
        views, self._exported = self._exported, None
        for view in views or ():
            try:
                view.release()
            except BufferError:
                self._exported = [*(self._exported or ()), view]
        return self._exported is not None


class ReadOnlyExternalData(ExternalData):
    """External data that is only looked at, so that nothing has to be tracked.

    The methods that write raise :exc:`ExternalDataReadOnly`.
    """

    __slots__ = ()

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> NoReturn:
        """Raises :exc:`ExternalDataReadOnly`."""
        raise ExternalDataReadOnly("this external data is mapped read-only")

    def fill(self, byte: int = 0, offset: int = 0, length: int | None = None) -> NoReturn:
        """Raises :exc:`ExternalDataReadOnly`."""
        raise ExternalDataReadOnly("this external data is mapped read-only")

    def preadv(
        self, fd: int, file_offset: int, offset: int = 0, length: int | None = None
    ) -> NoReturn:
        """Raises :exc:`ExternalDataReadOnly`: a file would be read into the guest's pages."""
        raise ExternalDataReadOnly("this external data is mapped read-only")

    def views(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        writable: bool = False,
        noted: bool = True,
    ) -> list[memoryview]:
        """Returns read-only views, and refuses writable ones."""
        if writable:
            raise ExternalDataReadOnly("this external data is mapped read-only")
        return super().views(offset, length)
