# SPDX-License-Identifier: GPL-2.0-or-later
"""Receive-side scaling: which channel gets a frame, as the guest sets it.

The Toeplitz hash of a frame picks an entry of the table, which is a channel's number. Sources:
*Introduction to Receive Side Scaling* of the Windows driver documentation; Linux ``hyperv_net.h``,
``struct ndis_recv_scale_cap`` and ``ndis_recv_scale_param``.

Invariants: a table that was taken has only channels below the number announced; what is malformed
raises an :class:`OidError` and changes nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from vhostvmbus.devices.net.errors import OidDataInvalid, OidLengthInvalid
from vhostvmbus.engine import lib

TABLE_SIZE: Final[int] = lib.VVB_NET_TABLE
"""The number of entries announced."""
KEY_SIZE: Final[int] = lib.VVB_NET_KEY
CAPABILITIES_TYPE: Final = 0x88
PARAMETERS_TYPE: Final = 0x89
REVISION: Final = 2

TOEPLITZ: Final = 0x00000001
_FUNCTIONS: Final = 0x000000FF
HASH_TYPES: Final[int] = (
    lib.VVB_NET_NDIS_HASH_IPV4
    | lib.VVB_NET_NDIS_HASH_TCP_IPV4
    | lib.VVB_NET_NDIS_HASH_IPV6
    | lib.VVB_NET_NDIS_HASH_TCP_IPV6
)
"""The types that may be hashed: ``native/headers.c`` does it."""
_CAPABILITY_TCP_IPV4: Final = 0x00000100
_CAPABILITY_TCP_IPV6: Final = 0x00000200
_CAPABILITY_AT_DPC: Final = 0x04000000

HASH_INFO_UNCHANGED: Final = 0x0002
TABLE_UNCHANGED: Final = 0x0004
KEY_UNCHANGED: Final = 0x0008
DISABLE: Final = 0x0010

_PARAMETERS = struct.Struct("<4xHHIHxxIHxxI")
_PARAMETERS_HEADER = struct.Struct("<BBH")
_CAPABILITIES = struct.Struct("<BBHIIIH")


@dataclass(frozen=True, slots=True)
class Scaling:
    """The settings of the guest; immutable, so that any thread may use them."""

    types: int = 0
    table: tuple[int, ...] = ()
    key: bytes = b""
    enabled: bool = False


@dataclass(slots=True)
class ReceiveScaling:
    """The two OIDs of receive-side scaling. ``channels`` is how many there may be."""

    channels: int
    current: Scaling = field(default_factory=Scaling)

    def capabilities(self, size: int) -> bytes:
        """Returns NDIS_RECEIVE_SCALE_CAPABILITIES of revision 2, at most ``size`` bytes (0: all
        20).

        Linux has 18 bytes for it, without the padding at the end, and drops longer answers.
        """
        whole = _CAPABILITIES.pack(
            CAPABILITIES_TYPE,
            REVISION,
            _CAPABILITIES.size,
            _CAPABILITY_TCP_IPV4 | _CAPABILITY_TCP_IPV6 | _CAPABILITY_AT_DPC | TOEPLITZ,
            self.channels,
            self.channels,
            TABLE_SIZE,
        )
        return whole if 0 < size < 20 else whole + b"\0\0"

    def set_parameters(self, data: bytes) -> None:
        """Takes NDIS_RECEIVE_SCALE_PARAMETERS. Raises :class:`OidError`.

        The header is not looked at: drivers exist that leave it empty. Without a hash function
        there is no scaling.
        """
        if len(data) < _PARAMETERS.size:
            raise OidLengthInvalid("info_buflen", len(data), 0)
        flags, _, info, table_size, table_at, key_size, key_at = _PARAMETERS.unpack_from(data)
        old = self.current
        if flags & DISABLE or not (flags & HASH_INFO_UNCHANGED or info & _FUNCTIONS):
            self.current = Scaling(old.types, old.table, old.key, enabled=False)
            return
        types = old.types if flags & HASH_INFO_UNCHANGED else self._types(info)
        table = old.table if flags & TABLE_UNCHANGED else self._table(data, table_at, table_size)
        key = old.key if flags & KEY_UNCHANGED else self._key(data, key_at, key_size)
        self.current = Scaling(types, table, key, bool(types and table and key))

    @staticmethod
    def _types(info: int) -> int:
        if not info & TOEPLITZ:
            raise OidDataInvalid("hashinfo", info, 8, "not Toeplitz")
        return info & HASH_TYPES

    def _table(self, data: bytes, offset: int, size: int) -> tuple[int, ...]:
        if not size or size % 4 or size > TABLE_SIZE * 4:
            raise OidDataInvalid("indirect_tabsize", size, 12)
        if offset < _PARAMETERS.size or offset + size > len(data):
            raise OidDataInvalid("indirect_taboffset", offset, 16)
        table = struct.unpack_from(f"<{size // 4}I", data, offset)
        for number, entry in enumerate(table):
            if entry >= self.channels:
                raise OidDataInvalid("indirection", entry, offset + 4 * number)
        return table

    @staticmethod
    def _key(data: bytes, offset: int, size: int) -> bytes:
        if size != KEY_SIZE:
            raise OidDataInvalid("hashkey_size", size, 20)
        if offset < _PARAMETERS.size or offset + size > len(data):
            raise OidDataInvalid("hashkey_offset", offset, 24)
        return data[offset : offset + size]

    def parameters(self) -> bytes:
        """Returns the parameters in force, for a query: header, table, key."""
        current = self.current
        table = struct.pack(f"<{len(current.table)}I", *current.table)
        start = _PARAMETERS.size + 12
        head = _PARAMETERS.pack(
            0 if current.enabled else DISABLE,
            0,
            current.types | TOEPLITZ if current.enabled else 0,
            len(table),
            start,
            len(current.key),
            start + len(table),
        )
        head = _PARAMETERS_HEADER.pack(PARAMETERS_TYPE, REVISION, start) + head[4:]
        return head + bytes(12) + table + current.key
