# SPDX-License-Identifier: GPL-2.0-or-later
"""External data that is only looked at: writing is refused, and nothing has to be tracked."""

from typing import NoReturn

from vhostvmbus.memory.external import ExternalData
from vhostvmbus.wire.errors import ExternalDataReadOnly


class ReadOnlyExternalData(ExternalData):
    """:class:`ExternalData` whose writing methods raise :exc:`ExternalDataReadOnly`."""

    __slots__ = ()

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> NoReturn:
        """Refused."""
        raise ExternalDataReadOnly("this external data is mapped read-only")

    def fill(self, byte: int = 0, offset: int = 0, length: int | None = None) -> NoReturn:
        """Refused."""
        raise ExternalDataReadOnly("this external data is mapped read-only")

    def preadv(
        self, fd: int, file_offset: int, offset: int = 0, length: int | None = None
    ) -> NoReturn:
        """Refused: a file would be read into the guest's pages."""
        raise ExternalDataReadOnly("this external data is mapped read-only")

    def views(
        self,
        offset: int = 0,
        length: int | None = None,
        *,
        writable: bool = False,
        noted: bool = True,
    ) -> list[memoryview]:
        """Read-only views."""
        if writable:
            raise ExternalDataReadOnly("this external data is mapped read-only")
        return super().views(offset, length)
