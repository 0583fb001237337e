# SPDX-License-Identifier: GPL-2.0-or-later
"""Reports what devices wrote for one channel's packets, before the guest is told of anything.

docs/vhost-user-vmbus.md, *Translated code*. Invariant: if the report fails the channel does; the
guest must not be told, since it might go on executing what was overwritten.
"""

from vhostvmbus.channel.gpadl import GpadlTable
from vhostvmbus.channel.stats import ChannelStats
from vhostvmbus.memory import WrittenMemory
from vhostvmbus.memory.written import Spans
from vhostvmbus.wire.errors import CodeInvalidationFailed


class ChannelWrites:
    """One channel's way to the memory's tracker. Every method may be called from any thread."""

    def __init__(
        self, memory: WrittenMemory, gpadls: GpadlTable, channel: int, stats: ChannelStats
    ) -> None:
        self._memory = memory
        self._gpadls = gpadls
        self._channel = channel
        self._stats = stats

    @property
    def watched(self) -> bool:
        """Tells whether anybody has to know what is written."""
        return self._memory.watched

    def report(self, spans: Spans) -> None:
        """Reports ``spans``, and what was written through GPADL mappings since the last report.

        May block. Raises :exc:`CodeInvalidationFailed`: nothing may be published then.
        """
        if not self._memory.watched:
            return
        spans = [*spans, *self._gpadls.take_written(self._channel)]
        if not spans:
            return
        try:
            self._stats.code_invalidations += self._memory.report(spans)
        except Exception as error:
            raise CodeInvalidationFailed("gpa", spans[0][0], detail=str(error)) from error
