# SPDX-License-Identifier: GPL-2.0-or-later
"""Receive-side scaling: which channel gets a frame. Toeplitz hash and indirection table.

Sources: *Introduction to Receive Side Scaling* and *Verifying the RSS Hash Calculation* of the
Windows driver documentation (the tests have its vectors); Linux ``hyperv_net.h``, ``struct
ndis_recv_scale_cap`` and ``ndis_recv_scale_param``. An entry of the table is a channel's number.

Invariants: a table that was taken has only channels below the number announced; what is malformed
raises an :class:`OidError` and changes nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from vhostvmbus.devices.net import frame
from vhostvmbus.devices.net.errors import OidDataInvalid, OidLengthInvalid

TABLE_SIZE: Final = 128
"""Entries announced."""
KEY_SIZE: Final = 40
HASH_BYTES: Final = 36
"""Longest input: two IPv6 addresses and two ports."""
CAPABILITIES_TYPE: Final = 0x88
PARAMETERS_TYPE: Final = 0x89
REVISION: Final = 2

TOEPLITZ: Final = 0x00000001
HASH_IPV4: Final = 0x00000100
HASH_TCP_IPV4: Final = 0x00000200
HASH_IPV6: Final = 0x00000400
HASH_TCP_IPV6: Final = 0x00001000
_CAPABILITY_TCP_IPV4: Final = 0x00000100
_CAPABILITY_TCP_IPV6: Final = 0x00000200
_CAPABILITY_AT_DPC: Final = 0x04000000

HASH_INFO_UNCHANGED: Final = 0x0002
TABLE_UNCHANGED: Final = 0x0004
KEY_UNCHANGED: Final = 0x0008
DISABLE: Final = 0x0010

_PARAMETERS = struct.Struct("<BBHHHIHxxIHxxI")
_CAPABILITIES = struct.Struct("<BBHIIIH")


class Toeplitz:
    """The hash for one key of 40 bytes, by a table for each byte of the input."""

    def __init__(self, key: bytes) -> None:
        bits = int.from_bytes(key, "big")
        total = len(key) * 8
        self.key = key
        self._tables = []
        for position in range(HASH_BYTES):
            table = [0]
            for bit in range(7, -1, -1):  # the least significant bit doubles the table first
                window = bits >> (total - 32 - position * 8 - bit) & 0xFFFFFFFF
                table += [value ^ window for value in table]
            self._tables.append(table)

    def hash(self, data: bytes) -> int:
        """The 32-bit hash of at most 36 bytes."""
        value = 0
        for table, byte in zip(self._tables, data, strict=False):
            value ^= table[byte]
        return value


def hash_input(head: bytes | bytearray, types: int) -> bytes:
    """What of a frame is hashed: addresses, and ports of TCP; empty if nothing is."""
    ethertype, at = frame.network_layer(head)
    if ethertype == frame.IPV4 and len(head) >= at + 20:
        addresses = bytes(head[at + 12 : at + 20])
        ports = at + (head[at] & 0x0F) * 4
        with_ports, without = HASH_TCP_IPV4, HASH_IPV4
    elif ethertype == frame.IPV6 and len(head) >= at + 40:
        addresses = bytes(head[at + 8 : at + 40])
        ports = at + 40
        with_ports, without = HASH_TCP_IPV6, HASH_IPV6
    else:
        return b""
    if types & with_ports and frame.transport(head) == frame.TCP and len(head) >= ports + 4:
        return addresses + bytes(head[ports : ports + 4])
    return addresses if types & without else b""


@dataclass(frozen=True, slots=True)
class Scaling:
    """What the guest set; immutable, so that any thread may use it."""

    types: int = 0
    table: tuple[int, ...] = ()
    toeplitz: Toeplitz | None = None
    enabled: bool = False

    def channel(self, head: bytes | bytearray) -> tuple[int, int | None]:
        """``(channel, hash)`` of a frame; hash None if nothing of it is hashed."""
        if not self.enabled or self.toeplitz is None:
            return 0, None
        data = hash_input(head, self.types)
        if not data:
            return 0, None
        value = self.toeplitz.hash(data)
        return self.table[value % len(self.table)], value


@dataclass(slots=True)
class ReceiveScaling:
    """The two OIDs of receive-side scaling. ``channels`` is how many there may be."""

    channels: int
    current: Scaling = field(default_factory=Scaling)

    def capabilities(self, size: int) -> bytes:
        """NDIS_RECEIVE_SCALE_CAPABILITIES of revision 2, at most ``size`` bytes (0: all 20).

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
        """NDIS_RECEIVE_SCALE_PARAMETERS. Raises :class:`OidError`."""
        if len(data) < _PARAMETERS.size:
            raise OidLengthInvalid("info_buflen", len(data), 0)
        kind, revision, _, flags, _, info, table_size, table_at, key_size, key_at = (
            _PARAMETERS.unpack_from(data)
        )
        if kind != PARAMETERS_TYPE:
            raise OidDataInvalid("hdr.type", kind, 0)
        if not revision:
            raise OidDataInvalid("hdr.rev", revision, 1)
        old = self.current
        if flags & DISABLE:
            self.current = Scaling(old.types, old.table, old.toeplitz, enabled=False)
            return
        types = old.types if flags & HASH_INFO_UNCHANGED else self._types(info)
        table = old.table if flags & TABLE_UNCHANGED else self._table(data, table_at, table_size)
        toeplitz = old.toeplitz if flags & KEY_UNCHANGED else self._key(data, key_at, key_size)
        self.current = Scaling(types, table, toeplitz, bool(types and table and toeplitz))

    @staticmethod
    def _types(info: int) -> int:
        if info and not info & TOEPLITZ:
            raise OidDataInvalid("hashinfo", info, 8, "not Toeplitz")
        return info & (HASH_IPV4 | HASH_TCP_IPV4 | HASH_IPV6 | HASH_TCP_IPV6)

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

    def _key(self, data: bytes, offset: int, size: int) -> Toeplitz:
        if size != KEY_SIZE:
            raise OidDataInvalid("hashkey_size", size, 20)
        if offset < _PARAMETERS.size or offset + size > len(data):
            raise OidDataInvalid("hashkey_offset", offset, 24)
        key = data[offset : offset + size]
        old = self.current.toeplitz
        return old if old is not None and old.key == key else Toeplitz(key)

    def parameters(self) -> bytes:
        """The parameters in force, for a query: header, table, key."""
        current = self.current
        key = current.toeplitz.key if current.toeplitz else b""
        table = struct.pack(f"<{len(current.table)}I", *current.table)
        start = _PARAMETERS.size + 12
        head = _PARAMETERS.pack(
            PARAMETERS_TYPE,
            REVISION,
            start,
            0 if current.enabled else DISABLE,
            0,
            current.types | TOEPLITZ if current.enabled else 0,
            len(table),
            start,
            len(key),
            start + len(table),
        )
        return head + bytes(12) + table + key
