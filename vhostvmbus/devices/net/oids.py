# SPDX-License-Identifier: GPL-2.0-or-later
"""The card as its guest asks for it: NDIS object identifiers, to query and to set.

Sources: [MS-RNDIS], the NDIS OID pages of the Windows driver documentation, Linux
``include/linux/rndis.h`` and ``drivers/net/hyperv/rndis_filter.c``. Numbers are little-endian;
an address is six bytes; lengths are in bytes, speeds in units of 100 bit/s.

Invariants: a query changes nothing; a set that raises changed nothing; nothing but
:class:`OidError` is raised. docs/devices/net.md has the table.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Final

from vhostvmbus.devices.net import offloads, rndis, rss
from vhostvmbus.devices.net.errors import OidDataInvalid, OidLengthInvalid, OidUnknown
from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.devices.net.offloads import Offloads
from vhostvmbus.devices.net.statistics import Counters
from vhostvmbus.engine import lib

SPEED: Final = 100_000_000
"""The speed that the card claims, 10 Gbit/s: a synthetic card has none of its own."""
MAX_MULTICAST: Final[int] = lib.VVB_NET_MULTICAST
ETHERNET_SIZE: Final[int] = lib.VVB_NET_ETHERNET
"""The bytes of an Ethernet header."""
VLAN_SIZE: Final[int] = lib.VVB_NET_VLAN
"""The bytes of an 802.1Q tag."""
MIN_MTU: Final = 68
"""The smallest MTU there is: RFC 791."""
DEFAULT_MTU: Final = 1500
"""The MTU that a driver begins with."""
FRIENDLY_NAME: Final = "Network Adapter"
"""The card's name; Linux takes any other one for the interface's alias."""
VENDOR: Final = b"vhostvmbus network card\0"

KNOWN_FILTER: Final = 0xFFFF
# serialized, no loopback, 802.1p priority, 802.1Q
_OFFERED_MAC_OPTIONS: Final = 0x02 | 0x08 | 0x40 | 0x200


class Change(Flag):
    """A change that a set made, for the card to act on."""

    NOTHING = 0
    FILTER = auto()
    OFFLOADS = auto()
    INDICATION = auto()
    """The guest expects to be told which offloads are in force now."""
    SCALING = auto()
    ADDRESS = auto()


@dataclass(slots=True)
class Adapter:
    """The state behind the OIDs. Written by the primary channel's worker, read by any thread."""

    permanent_address: bytes
    mtu: int
    """The link's MTU."""
    able: Capabilities
    """The offloads that the link takes and may give."""
    scaling: rss.ReceiveScaling
    count: Callable[[], Counters]
    """Returns the sums of all counters."""
    current_address: bytes = b""
    connected: bool = False
    coalescing: bool = False
    """Set if a received frame may take several sections: from version 6.1, if the guest can."""
    packet_filter: int = 0
    multicast: frozenset[bytes] = frozenset()
    lookahead: int = 1514
    guest_mtu: int = DEFAULT_MTU
    """The MTU that the guest works with.

    The link's may become another one at any time: that the guest does not know it is no mistake of
    the guest's.
    """
    offloads: Offloads = field(default_factory=Offloads)
    """The offloads in force."""
    barred: Offloads = field(default_factory=Offloads)
    """The offloads that a keyword of the driver's settings has switched off."""

    def __post_init__(self) -> None:
        self.current_address = self.permanent_address
        self.offloads = self.first

    def reset(self) -> None:
        """Sets everything to what it was when the guest began, but for the address.

        Linux opens the channel anew for another MTU, and does not set an address again then.
        """
        self.halt()
        self.offloads = self.first
        self.barred = Offloads()

    def halt(self) -> None:
        """Gives the guest nothing any more, but lets it go on sending by what it has agreed on.

        Linux halts the card first, then waits for what it has in all the channels' rings.
        """
        self.packet_filter = 0
        self.multicast = frozenset()
        self.scaling.current = rss.Scaling()

    @property
    def longest(self) -> int:
        """The bytes of the longest frame that the guest may send, without a tag."""
        return max(self.mtu, self.guest_mtu) + ETHERNET_SIZE

    @property
    def offered(self) -> Offloads:
        """The offloads that can be switched on."""
        return Offloads.all_of(self.able, self.coalescing)

    @property
    def first(self) -> Offloads:
        """The offloads in force before the guest has said anything of them: Windows uses them all.

        A frame in several sections has to be asked for.
        """
        return Offloads.all_of(self.able, False)


def _number(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


def _unpack(data: bytes) -> int:
    if len(data) < 4:
        raise OidLengthInvalid("info_buflen", len(data), 0)
    value: int = struct.unpack_from("<I", data)[0]
    return value


# -- queries --------------------------------------------------------------------------------------

Query = Callable[[Adapter, bytes], bytes]


def _constant(value: int) -> Query:
    return lambda _adapter, _data: _number(value)


def _counter(value: Callable[[Counters], int]) -> Query:
    """Answers with four bytes, as RNDIS has it; NDIS_STATISTICS_INFO has the whole number."""
    return lambda adapter, _data: _number(value(adapter.count()))


def _statistics(adapter: Adapter, _data: bytes) -> bytes:
    """Answers with NDIS_STATISTICS_INFO, revision 1."""
    now = adapter.count()
    rx, tx = now.received, now.sent
    values = (
        now.receive_no_buffer + now.receive_errors, now.receive_errors,
        rx.bytes, rx.directed_frames, rx.multicast_frames, rx.broadcast_frames,
        tx.bytes, tx.directed_frames, tx.multicast_frames, tx.broadcast_frames,
        now.send_errors, now.send_refused,
        rx.directed_bytes, rx.multicast_bytes, rx.broadcast_bytes,
        tx.directed_bytes, tx.multicast_bytes, tx.broadcast_bytes,
    )  # fmt: skip
    body = struct.pack(f"<{len(values)}Q", *values)
    return struct.pack("<BBHI", offloads.DEFAULT_TYPE, 1, 8 + len(body), 0x3FFFF) + body


_BITS_A_SECOND: Final = (SPEED * 100, SPEED * 100)
"""The speeds of sending and receiving."""
_CONNECTED: Final = 1
_DISCONNECTED: Final = 2
_FULL_DUPLEX: Final = 2


def _link_state(adapter: Adapter, _data: bytes) -> bytes:
    """Answers with NDIS_LINK_STATE: no pauses, nothing negotiated."""
    media = _CONNECTED if adapter.connected else _DISCONNECTED
    body = struct.pack("<II4xQQII", media, _FULL_DUPLEX, *_BITS_A_SECOND, 0, 0)
    return struct.pack("<BBH", offloads.DEFAULT_TYPE, 1, 4 + len(body)) + body


def _supported(_adapter: Adapter, _data: bytes) -> bytes:
    return b"".join(_number(oid) for oid in sorted({*QUERIES, *SETS}))


def _hardware_offloads(adapter: Adapter, data: bytes) -> bytes:
    return offloads.describe(adapter.offered, offloads.revision_wanted(data))


def _current_offloads(adapter: Adapter, data: bytes) -> bytes:
    return offloads.describe(adapter.offloads, offloads.revision_wanted(data))


def _scaling_capabilities(adapter: Adapter, data: bytes) -> bytes:
    size = 0
    if data:
        if len(data) < 4:
            raise OidLengthInvalid("info_buflen", len(data), 0)
        size = int.from_bytes(data[2:4], "little")
    return adapter.scaling.capabilities(size)


QUERIES: Final[dict[int, Query]] = {
    0x00010101: _supported,  # GEN_SUPPORTED_LIST
    0x00010102: _constant(0),  # GEN_HARDWARE_STATUS: ready
    0x00010103: _constant(0),  # GEN_MEDIA_SUPPORTED: 802.3
    0x00010104: _constant(0),  # GEN_MEDIA_IN_USE
    0x00010105: lambda adapter, _: _number(adapter.mtu),  # GEN_MAXIMUM_LOOKAHEAD
    0x00010106: lambda adapter, _: _number(adapter.mtu),  # GEN_MAXIMUM_FRAME_SIZE
    0x00010107: _constant(SPEED),  # GEN_LINK_SPEED
    0x00010108: lambda adapter, _: _number(64 * (adapter.mtu + ETHERNET_SIZE)),  # TRANSMIT_BUFFER
    0x00010109: lambda adapter, _: _number(64 * (adapter.mtu + ETHERNET_SIZE)),  # RECEIVE_BUFFER
    0x0001010A: lambda adapter, _: _number(adapter.mtu + ETHERNET_SIZE),  # TRANSMIT_BLOCK_SIZE
    0x0001010B: lambda adapter, _: _number(adapter.mtu + ETHERNET_SIZE),  # RECEIVE_BLOCK_SIZE
    0x0001010C: _constant(0x00FFFFFF),  # GEN_VENDOR_ID: none assigned
    0x0001010D: lambda _adapter, _: VENDOR,  # GEN_VENDOR_DESCRIPTION
    0x0001010E: lambda adapter, _: _number(adapter.packet_filter),  # GEN_CURRENT_PACKET_FILTER
    0x0001010F: lambda adapter, _: _number(adapter.lookahead),  # GEN_CURRENT_LOOKAHEAD
    0x00010110: lambda _adapter, _: struct.pack("<H", 0x0600),  # GEN_DRIVER_VERSION
    0x00010111: lambda adapter, _: _number(adapter.mtu + ETHERNET_SIZE),  # GEN_MAXIMUM_TOTAL_SIZE
    0x00010113: _constant(_OFFERED_MAC_OPTIONS),  # GEN_MAC_OPTIONS
    0x00010114: lambda adapter, _: _number(not adapter.connected),  # GEN_MEDIA_CONNECT_STATUS
    0x00010115: _constant(rndis.MAX_PACKETS_PER_MESSAGE),  # GEN_MAXIMUM_SEND_PACKETS
    0x00010116: _constant(0x00010000),  # GEN_VENDOR_DRIVER_VERSION
    0x00010202: _constant(14),  # GEN_PHYSICAL_MEDIUM: 802.3
    0x00010203: _scaling_capabilities,  # GEN_RECEIVE_SCALE_CAPABILITIES
    0x00010204: lambda adapter, _: adapter.scaling.parameters(),  # GEN_RECEIVE_SCALE_PARAMETERS
    0x00010206: lambda _adapter, _: struct.pack("<QQ", *_BITS_A_SECOND),  # GEN_MAX_LINK_SPEED
    0x00010207: _link_state,  # GEN_LINK_STATE
    0x00020101: _counter(lambda now: now.sent.frames),  # GEN_XMIT_OK
    0x00020102: _counter(lambda now: now.received.frames),  # GEN_RCV_OK
    0x00020103: _counter(lambda now: now.send_errors),  # GEN_XMIT_ERROR
    0x00020104: _counter(lambda now: now.receive_errors),  # GEN_RCV_ERROR
    0x00020105: _counter(lambda now: now.receive_no_buffer),  # GEN_RCV_NO_BUFFER
    0x00020106: _statistics,  # GEN_STATISTICS
    0x00020201: _counter(lambda now: now.sent.directed_bytes),
    0x00020202: _counter(lambda now: now.sent.directed_frames),
    0x00020203: _counter(lambda now: now.sent.multicast_bytes),
    0x00020204: _counter(lambda now: now.sent.multicast_frames),
    0x00020205: _counter(lambda now: now.sent.broadcast_bytes),
    0x00020206: _counter(lambda now: now.sent.broadcast_frames),
    0x00020207: _counter(lambda now: now.received.directed_bytes),
    0x00020208: _counter(lambda now: now.received.directed_frames),
    0x00020209: _counter(lambda now: now.received.multicast_bytes),
    0x0002020A: _counter(lambda now: now.received.multicast_frames),
    0x0002020B: _counter(lambda now: now.received.broadcast_bytes),
    0x0002020C: _counter(lambda now: now.received.broadcast_frames),
    0x0002020D: _constant(0),  # GEN_RCV_CRC_ERROR
    0x0002020E: _constant(0),  # GEN_TRANSMIT_QUEUE_LENGTH
    0x00020219: lambda adapter, _: struct.pack("<Q", adapter.count().received.bytes),  # BYTES_RCV
    0x0002021A: lambda adapter, _: struct.pack("<Q", adapter.count().sent.bytes),  # BYTES_XMIT
    0x00020216: lambda _adapter, _: FRIENDLY_NAME.encode("utf-16-le"),  # GEN_FRIENDLY_NAME
    0x01010101: lambda adapter, _: adapter.permanent_address,  # 802_3_PERMANENT_ADDRESS
    0x01010102: lambda adapter, _: adapter.current_address,  # 802_3_CURRENT_ADDRESS
    0x01010103: lambda adapter, _: b"".join(sorted(adapter.multicast)),  # 802_3_MULTICAST_LIST
    0x01010104: _constant(MAX_MULTICAST),  # 802_3_MAXIMUM_LIST_SIZE
    0x01010105: _constant(1),  # 802_3_MAC_OPTIONS: priority
    0x0101010A: lambda _adapter, _: offloads.describe_encapsulation(),  # OFFLOAD_ENCAPSULATION
    0x01020101: _constant(0),  # 802_3_RCV_ERROR_ALIGNMENT
    0x01020102: _constant(0),  # 802_3_XMIT_ONE_COLLISION
    0x01020103: _constant(0),  # 802_3_XMIT_MORE_COLLISIONS
    0xFC01020B: _current_offloads,  # TCP_OFFLOAD_CURRENT_CONFIG
    0xFC01020D: _hardware_offloads,  # TCP_OFFLOAD_HARDWARE_CAPABILITIES
}


# -- sets -----------------------------------------------------------------------------------------

Setter = Callable[[Adapter, bytes], Change]


def _set_filter(adapter: Adapter, data: bytes) -> Change:
    value = _unpack(data)
    if value & ~KNOWN_FILTER:
        raise OidDataInvalid("packet_filter", value, 0)
    adapter.packet_filter = value
    return Change.FILTER


def _set_lookahead(adapter: Adapter, data: bytes) -> Change:
    adapter.lookahead = _unpack(data)
    return Change.NOTHING


def _check_number(_adapter: Adapter, data: bytes) -> Change:
    """Takes a number that changes nothing here: a whole frame is always given."""
    _unpack(data)
    return Change.NOTHING


def _take_anything(_adapter: Adapter, _data: bytes) -> Change:
    """Takes what an overlying driver wants known, and does nothing."""
    return Change.NOTHING


def _set_multicast(adapter: Adapter, data: bytes) -> Change:
    if len(data) % 6:
        raise OidLengthInvalid("info_buflen", len(data), 0)
    found = frozenset(data[at : at + 6] for at in range(0, len(data), 6))
    if len(found) > MAX_MULTICAST:
        raise OidDataInvalid("multicast_list", len(found), 0, f"at most {MAX_MULTICAST}")
    adapter.multicast = found
    return Change.FILTER


def _set_address(adapter: Adapter, address: bytes) -> Change:
    if len(address) != 6:
        raise OidLengthInvalid("info_buflen", len(address), 0)
    if address[0] & 1 or not any(address):
        raise OidDataInvalid("address", int.from_bytes(address, "big"), 0, "no station's address")
    adapter.current_address = address
    return Change.ADDRESS


_CONFIG = struct.Struct("<IIIII")
_CONFIG_INTEGER: Final = 0
_CONFIG_STRING: Final = 2
_CONFIG_LIMIT: Final = 255
"""The most bytes of a name or a value."""


def _text(field_name: str, data: bytes) -> str:
    try:
        return data[: len(data) & ~1].decode("utf-16-le").rstrip("\0")
    except UnicodeDecodeError as error:
        raise OidDataInvalid(f"parameter_{field_name}", len(data), 0, "no UTF-16") from error


def _set_configuration(adapter: Adapter, data: bytes) -> Change:
    """Takes ``struct rndis_config_parameter_info``: a keyword of the driver's settings, its value.

    Linux sets the address so (``NetworkAddress``), Windows offloads. What is not known is taken,
    with no effect: a driver has many keywords.
    """
    if len(data) < _CONFIG.size:
        raise OidLengthInvalid("info_buflen", len(data), 0)
    name_at, name_size, kind, value_at, value_size = _CONFIG.unpack_from(data)
    for field_name, at, size in (("name", name_at, name_size), ("value", value_at, value_size)):
        if size > _CONFIG_LIMIT or at < _CONFIG.size or size > len(data) - at:
            raise OidDataInvalid(f"parameter_{field_name}_offset", at, 0, f"{size} bytes")
    name = _text("name", data[name_at : name_at + name_size])
    value = data[value_at : value_at + value_size]
    if kind == _CONFIG_STRING:
        text = _text("value", value)
        if name == "NetworkAddress":
            return _set_address_text(adapter, text)
        if not offloads.keyword(name, 0):
            return Change.NOTHING
        if not "0" <= text[:1] <= "9":
            raise OidDataInvalid("parameter_value", len(value), 0, ascii(text[:40]))
        return _set_keyword(adapter, name, int(text[0]))
    if kind == _CONFIG_INTEGER:
        return _set_keyword(adapter, name, int.from_bytes(value[:4], "little"))
    return Change.NOTHING


def _set_address_text(adapter: Adapter, text: str) -> Change:
    digits = text.replace("-", "").replace(":", "")
    if len(digits) != 12 or not all(digit in "0123456789abcdefABCDEF" for digit in digits):
        raise OidDataInvalid("parameter_value", len(text), 0, ascii(text[:40]))
    return _set_address(adapter, bytes.fromhex(digits))


def _set_keyword(adapter: Adapter, name: str, value: int) -> Change:
    settings = offloads.keyword(name, value)
    if not settings:
        return Change.NOTHING
    adapter.offloads = adapter.offloads.but(settings).within(adapter.offered)
    adapter.barred = adapter.barred.but({name: not on for name, on in settings.items()})
    return Change.OFFLOADS


def _set_offloads(adapter: Adapter, data: bytes) -> Change:
    adapter.offloads = offloads.with_parameters(adapter.offloads, adapter.offered, data)
    return Change.OFFLOADS | Change.INDICATION


def _set_encapsulation(adapter: Adapter, data: bytes) -> Change:
    """Takes NDIS_OFFLOAD_ENCAPSULATION: what is offered, and no keyword has barred, for 802.3."""
    able = adapter.offered.without(adapter.barred)
    adapter.offloads = offloads.with_encapsulation(adapter.offloads, able, data)
    return Change.OFFLOADS | Change.INDICATION


def _set_scaling(adapter: Adapter, data: bytes) -> Change:
    adapter.scaling.set_parameters(data)
    return Change.SCALING


SETS: Final[dict[int, Setter]] = {
    0x0001010E: _set_filter,  # GEN_CURRENT_PACKET_FILTER
    0x0001010F: _set_lookahead,  # GEN_CURRENT_LOOKAHEAD
    0x00010112: _check_number,  # GEN_PROTOCOL_OPTIONS
    0x00010118: _take_anything,  # GEN_NETWORK_LAYER_ADDRESSES
    0x00010208: _take_anything,  # GEN_LINK_PARAMETERS
    0x0001021B: _set_configuration,  # GEN_RNDIS_CONFIG_PARAMETER
    0x00010204: _set_scaling,  # GEN_RECEIVE_SCALE_PARAMETERS
    0x01010102: _set_address,  # 802_3_CURRENT_ADDRESS
    0x01010103: _set_multicast,  # 802_3_MULTICAST_LIST
    0x0101010A: _set_encapsulation,  # OFFLOAD_ENCAPSULATION
    0xFC01020C: _set_offloads,  # TCP_OFFLOAD_PARAMETERS
    0xFD010101: _check_number,  # PNP_SET_POWER
}


def query(adapter: Adapter, oid: int, information: bytes) -> bytes:
    """Returns the value of ``oid``. Raises :class:`OidError`."""
    found = QUERIES.get(oid)
    if found is None:
        raise OidUnknown("oid", oid, 12, "query")
    return found(adapter, information)


def set_value(adapter: Adapter, oid: int, information: bytes) -> Change:
    """Sets ``oid``. Returns what changed. Raises :class:`OidError`."""
    found = SETS.get(oid)
    if found is None:
        raise OidUnknown("oid", oid, 12, "set")
    return found(adapter, information)
