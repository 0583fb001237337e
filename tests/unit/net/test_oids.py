# SPDX-License-Identifier: GPL-2.0-or-later
"""OIDs, offload settings and receive-side scaling: bytes in, bytes out."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.net_codec import MAC, adapter
from vhostvmbus.devices.net import offloads, oids
from vhostvmbus.devices.net.errors import OidDataInvalid, OidError, OidLengthInvalid, OidUnknown
from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.devices.net.oids import Change
from vhostvmbus.devices.net.statistics import Counters

# -- queries and sets ------------------------------------------------------------------------------


def number(oid: int, state: oids.Adapter | None = None) -> int:
    data = oids.query(state or adapter(), oid, b"")
    assert len(data) == 4
    return int.from_bytes(data, "little")


def test_what_linux_asks_at_its_start() -> None:
    state = adapter()
    assert number(0x00010106, state) == 1500
    assert oids.query(state, 0x01010101, b"") == MAC
    assert oids.query(state, 0x00020216, b"").decode("utf-16-le") == "Network Adapter"
    assert number(0x00010114, state) == 0
    state.connected = False
    assert number(0x00010114, state) == 1
    assert number(0x00010107, state) // 10_000 == 10_000  # Mbit/s


def test_every_oid_of_the_list_answers() -> None:
    state = adapter()
    listed = oids.query(state, 0x00010101, b"")
    found = struct.unpack(f"<{len(listed) // 4}I", listed)
    assert set(found) == {*oids.QUERIES, *oids.SETS}
    assert list(found) == sorted(found)
    for oid in oids.QUERIES:
        assert isinstance(oids.query(state, oid, b""), bytes)


def test_statistics() -> None:
    counters = Counters()
    counters.sent.count(MAC, 100)
    counters.sent.count(b"\xff" * 6, 60)
    counters.received.count(b"\x33\x33\0\0\0\x01", 86)
    counters.received.directed_bytes = 1 << 33
    counters.receive_no_buffer = 3
    state = adapter(counters=counters)
    assert number(0x00020101, state) == 2
    assert number(0x00020102, state) == 1
    assert number(0x00020105, state) == 3
    assert number(0x00020205, state) == 60
    assert number(0x00020207, state) == 0  # four bytes, that wrap
    whole = oids.query(state, 0x00020106, b"")
    kind, revision, size, valid = struct.unpack_from("<BBHI", whole)
    assert (kind, revision, size, valid) == (0x80, 1, len(whole), 0x3FFFF)
    values = struct.unpack_from("<18Q", whole, 8)
    assert values[0] == 3
    assert values[2] == (1 << 33) + 86
    assert values[6:10] == (160, 1, 0, 1)


def test_the_filter() -> None:
    state, joined = adapter(), bytes.fromhex("333300000001")
    assert oids.set_value(state, 0x01010103, joined) is Change.FILTER
    for value in (0, 0x0D, 0x20):
        assert oids.set_value(state, 0x0001010E, struct.pack("<I", value)) is Change.FILTER
        assert number(0x0001010E, state) == value
    with pytest.raises(OidDataInvalid):
        oids.set_value(state, 0x0001010E, struct.pack("<I", 0x10000))
    assert state.packet_filter == 0x20
    assert oids.query(state, 0x01010103, b"") == joined


def configuration(name: str, value: str, kind: int = 2) -> bytes:
    raw = name.encode("utf-16-le"), value.encode("utf-16-le")
    head = struct.pack("<IIIII", 20, len(raw[0]), kind, 20 + len(raw[0]), len(raw[1]))
    return head + raw[0] + raw[1]


def test_the_address() -> None:
    state = adapter()
    new = bytes.fromhex("0a0b0c0d0e0f")
    data = configuration("NetworkAddress", "0a0b0c0d0E0F")
    assert oids.set_value(state, 0x0001021B, data) is Change.ADDRESS
    assert oids.query(state, 0x01010102, b"") == new
    assert oids.query(state, 0x01010101, b"") == MAC
    assert oids.set_value(state, 0x01010102, MAC) is Change.ADDRESS
    assert oids.query(state, 0x01010102, b"") == MAC
    for bad in (
        configuration("NetworkAddress", "0a0b0c0d0e"),
        configuration("NetworkAddress", "0a0b0c0d0e0g"),
        configuration("NetworkAddress", "010b0c0d0e0f"),
        configuration("NetworkAddress", "000000000000"),
        struct.pack("<IIIII", 20, 0xFFFFFFFE, 2, 20, 0),
        struct.pack("<IIIII", 0xFFFFFFFE, 4, 2, 20, 0),
        struct.pack("<IIIII", 20, 0, 2, 19, 0),
    ):
        with pytest.raises(OidDataInvalid):
            oids.set_value(state, 0x0001021B, bad)
    assert state.current_address == MAC


# -- keywords of the driver's settings -------------------------------------------------------------

KEYWORDS = [
    ("*IPChecksumOffloadIPv4", "ip_checksum", None),
    ("*TCPChecksumOffloadIPv4", "tcp4_send", "tcp4_receive"),
    ("*TCPChecksumOffloadIPv6", "tcp6_send", "tcp6_receive"),
    ("*UDPChecksumOffloadIPv4", "udp4_send", "udp4_receive"),
    ("*UDPChecksumOffloadIPv6", "udp6_send", "udp6_receive"),
]


def integer(name: str, value: int) -> bytes:
    raw = name.encode("utf-16-le")
    return struct.pack("<IIIII", 20, len(raw), 0, 20 + len(raw), 4) + raw + struct.pack("<I", value)


@pytest.mark.parametrize(("name", "send", "receive"), KEYWORDS)
def test_a_keyword_for_a_checksum(name: str, send: str, receive: str | None) -> None:
    """Bit 0 is sending, bit 1 receiving; it may be a digit or a number; nothing else changes."""
    state = adapter()
    before = state.offloads
    for value in (0, 1, 2, 3, 0):
        for data in (configuration(name, str(value)), integer(name, value)):
            assert oids.set_value(state, 0x0001021B, data) is Change.OFFLOADS
            assert getattr(state.offloads, send) == bool(value & 1)
            if receive is not None:
                assert getattr(state.offloads, receive) == bool(value & 2)
    oids.set_value(state, 0x0001021B, configuration(name, "3, as ever\0"))
    assert state.offloads == before


@pytest.mark.parametrize("version", [4, 6])
def test_a_keyword_for_large_sends(version: int) -> None:
    state = adapter()
    for value in (0, 1, 0, 2):
        data = configuration(f"*LsoV2IPv{version}", str(value))
        assert oids.set_value(state, 0x0001021B, data) is Change.OFFLOADS
        assert getattr(state.offloads, f"lso{version}") == bool(value)
        assert getattr(state.offloads, f"lso{10 - version}")


def test_a_keyword_for_what_the_link_cannot_do() -> None:
    state = adapter(Capabilities())
    for name in ("*LsoV2IPv4", "*TCPChecksumOffloadIPv4", "*IPChecksumOffloadIPv4"):
        oids.set_value(state, 0x0001021B, configuration(name, "3"))
    assert state.offloads == offloads.Offloads()


def test_keywords_that_say_nothing_here() -> None:
    """A driver has many; also a kind of value that is not known is no mistake."""
    state = adapter()
    before = state.offloads
    for data in (
        configuration("*JumboPacket", "1514"),
        configuration("Anything", "not a number"),
        configuration("*TCPChecksumOffloadIPv4", "0", kind=3),
        configuration("NetworkAddress", "0a0b0c0d0e0f", kind=0),
        integer("*PriorityVLANTag", 3),
        struct.pack("<IIIII", 20, 1, 2, 20, 0) + bytes(4),  # half a letter
        struct.pack("<IIIII", 20, 0, 2, 20, 0),
    ):
        assert oids.set_value(state, 0x0001021B, data) is Change.NOTHING
    assert (state.offloads, state.current_address) == (before, MAC)


@pytest.mark.parametrize(
    "data",
    [
        configuration("*TCPChecksumOffloadIPv4", "x"),
        configuration("*TCPChecksumOffloadIPv4", ""),
        configuration("*LsoV2IPv4", "\u0664"),  # a digit, but none of those
        struct.pack("<IIIII", 20, 4, 2, 24, 0) + b"\x00\xd8\x00\xd8",
        struct.pack("<IIIII", 20, 2, 2, 22, 4) + b"x\0" + b"\x00\xd8\x00\xd8",
        struct.pack("<IIIII", 20, 256, 2, 276, 2) + bytes(300),
        struct.pack("<IIIII", 20, 2, 2, 22, 256) + bytes(300),
    ],
)
def test_keywords_that_are_refused(data: bytes) -> None:
    state = adapter()
    before = state.offloads
    with pytest.raises(OidDataInvalid):
        oids.set_value(state, 0x0001021B, data)
    assert state.offloads == before


ANY_LENGTH = (0x01010103, 0x00010118, 0x00010208)
"""The multicast list, and what is taken with no effect."""


@pytest.mark.parametrize("oid", [oid for oid in oids.SETS if oid not in ANY_LENGTH])
def test_a_set_that_is_too_short(oid: int) -> None:
    state = adapter()
    for size in (0, 1, 3):
        with pytest.raises(OidLengthInvalid):
            oids.set_value(state, oid, bytes(size))


def test_sets_that_are_refused() -> None:
    state = adapter()
    with pytest.raises(OidUnknown):
        oids.query(state, 0x0001010E + 0x100000, b"")
    with pytest.raises(OidUnknown):
        oids.set_value(state, 0x01010101, MAC)
    with pytest.raises(OidLengthInvalid):
        oids.set_value(state, 0x01010103, bytes(7))
    with pytest.raises(OidDataInvalid):
        oids.set_value(
            state, 0x01010103, b"".join(b"\x01\0\0\0" + struct.pack(">H", n) for n in range(33))
        )
    for oid in (0x0001010F, 0x00010112, 0xFD010101):
        assert oids.set_value(state, oid, struct.pack("<I", 2)) is Change.NOTHING


@given(
    st.sampled_from(sorted({*oids.QUERIES, *oids.SETS, 1})), st.binary(max_size=700), st.booleans()
)
def test_any_information(oid: int, data: bytes, query: bool) -> None:
    state, fresh = adapter(), adapter()
    fresh.count = state.count
    try:
        if query:
            oids.query(state, oid, data)
        else:
            oids.set_value(state, oid, data)
            fresh = state
    except OidError as error:
        refused = error.rndis_status
    else:
        refused = 3 << 30
    assert refused >> 30 == 3
    assert state == fresh


# -- offloads --------------------------------------------------------------------------------------

ALL = Capabilities(True, True, True)
NDIS_OFFLOAD = struct.Struct("<BBH 8I 16x 28x 7I 4x 32x 2B2x 8x")


@pytest.mark.parametrize(
    ("revision", "size", "length"), [(1, 112, 112), (2, 144, 144), (3, 156, 156), (3, 150, 144)]
)
def test_hardware_capabilities(revision: int, size: int, length: int) -> None:
    state = adapter()
    state.coalescing = True
    data = oids.query(state, 0xFC01020D, struct.pack("<BBH", 0xA7, revision, size))
    assert len(data) == length
    assert struct.unpack_from("<BBH", data) == (0xA7, 3 if length == 156 else revision - (
        length != size), length)  # fmt: skip
    whole = data.ljust(156, b"\0")
    fields = NDIS_OFFLOAD.unpack(whole)
    ip4_tx_enc, ip4_tx, _, ip4_rx, _, ip6_tx, _, ip6_rx = fields[3:11]
    assert ip4_tx_enc == 2
    assert ip4_tx & 0x14 == 0x14  # NDIS_TXCSUM_ALL_TCP4
    assert ip4_tx & 0x40
    assert ip6_tx & 0x15 == 0x15  # NDIS_TXCSUM_ALL_TCP6
    assert ip4_rx & 0x50 == 0x50
    assert ip6_rx & 0x50 == 0x50
    assert fields[11:18] == (2, 0xF53C, 2, 2, 0xF53C, 2, 5)
    assert fields[18:] == ((1, 1) if length == 156 else (0, 0))


@pytest.mark.parametrize(
    ("able", "coalescing", "expected"),
    [
        (Capabilities(), True, (0, 0, 0, 0)),
        (Capabilities(True, False, False), True, (1, 0, 0, 0)),
        (Capabilities(False, True, True), True, (0, 0, 0, 0)),
        (Capabilities(True, True, False), False, (1, 1, 0, 0)),
        (Capabilities(True, True, False), True, (1, 1, 0, 1)),
    ],
)
def test_only_what_the_link_can(
    able: Capabilities, coalescing: bool, expected: tuple[int, ...]
) -> None:
    state = adapter(able)
    state.coalescing = coalescing
    fields = NDIS_OFFLOAD.unpack(oids.query(state, 0xFC01020D, b""))
    assert tuple(map(bool, (fields[4], fields[11], fields[14], fields[18]))) == expected
    assert fields[3] == (2 if expected[0] else 0)
    in_force = NDIS_OFFLOAD.unpack(oids.query(adapter(able), 0xFC01020B, b""))
    assert in_force[3:18] == fields[3:18]  # from the start, but for coalescing
    assert in_force[18:] == (0, 0)


def parameters(*settings: int, rsc: tuple[int, int] | None = None) -> bytes:
    data = struct.pack("<BBH", 0x80, 3, 28) + bytes(settings).ljust(11, b"\0")
    if rsc is None:
        return data.ljust(22, b"\0")
    return data.ljust(22, b"\0") + bytes(rsc) + bytes(4)


def test_linux_switches_everything_on() -> None:
    state = adapter()
    state.coalescing = True
    # ip, tcp4, udp4, tcp6, udp6, lso1, ipsec, lso4, lso6
    data = parameters(1, 4, 4, 4, 4, 0, 0, 2, 2, rsc=(2, 2))
    assert oids.set_value(state, 0xFC01020C, data) == Change.OFFLOADS | Change.INDICATION
    expected = offloads.Offloads.all_of(ALL, True)
    assert not state.offloads.ip_checksum
    assert expected == state.offloads.but({"ip_checksum": True})
    assert state.offloads.receive == ALL
    oids.set_value(state, 0xFC01020C, parameters(rsc=(1, 1)))
    assert state.offloads.receive == Capabilities(True, False, False)
    assert state.offloads.lso4
    oids.set_value(state, 0xFC01020C, parameters(0, 2, 3, 1, 0, 0, 0, 1, 0))
    now = state.offloads
    assert (now.tcp4_send, now.tcp4_receive) == (True, False)
    assert (now.udp4_send, now.udp4_receive) == (False, True)
    assert (now.tcp6_send, now.tcp6_receive) == (False, False)
    assert (now.udp6_send, now.udp6_receive) == (True, True)
    assert (now.lso4, now.lso6) == (False, True)
    assert now.receive == Capabilities()


@pytest.mark.parametrize(
    "data",
    [
        parameters(0, 5),
        parameters(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255),
        struct.pack("<BBH", 0x81, 3, 28) + bytes(24),
        struct.pack("<BBH", 0x80, 0, 28) + bytes(24),
    ],
)
def test_settings_that_cannot_be(data: bytes) -> None:
    state = adapter(Capabilities(True, False, True))
    with pytest.raises(OidDataInvalid):
        oids.set_value(state, 0xFC01020C, data)
    assert state.offloads == state.first


def test_settings_beyond_the_offer() -> None:
    """Windows asks for all that it knows: it gets what there is, and is told that."""
    state = adapter(Capabilities(True, False, True))
    data = parameters(4, 4, 4, 4, 4, 2, 4, 2, 2, 4, 4, rsc=(2, 2))
    assert Change.INDICATION in oids.set_value(state, 0xFC01020C, data)
    assert state.offloads == state.offered
    assert not state.offloads.lso4
    assert state.offloads.lso6
    oids.set_value(adapter(Capabilities()), 0xFC01020C, data)


def test_questions_that_make_no_sense_are_answered() -> None:
    whole = oids.query(adapter(), 0xFC01020D, b"")
    assert struct.unpack_from("<BBH", whole) == (0xA7, 3, 156)
    for header in ((0xA8, 3, 156), (0xA7, 0, 156), (0xA7, 3, 111), (0, 0, 0)):
        assert oids.query(adapter(), 0xFC01020D, struct.pack("<BBH", *header)) == whole


def encapsulation(*words: int) -> bytes:
    return struct.pack("<BBH", 0xA8, 1, 28) + struct.pack(f"<{len(words)}I", *words)


ETHERNET_ON, OFF, UNCHANGED = (1, 2, 14), (2, 0, 0), (0, 0, 0)


def test_encapsulation_switches_on_what_there_is() -> None:
    state = adapter(Capabilities(True, False, True))
    state.coalescing = True
    data = encapsulation(*OFF, *OFF)
    assert oids.set_value(state, 0x0101010A, data) == Change.OFFLOADS | Change.INDICATION
    assert state.offloads == offloads.Offloads()
    oids.set_value(state, 0x0101010A, encapsulation(*ETHERNET_ON, *UNCHANGED))
    assert state.offloads.tcp4_send
    assert not state.offloads.tcp6_send
    oids.set_value(state, 0x0101010A, encapsulation(*UNCHANGED, *ETHERNET_ON))
    assert state.offloads == state.first
    assert not state.offloads.lso4
    oids.set_value(state, 0x0101010A, encapsulation(*OFF))  # of IPv4 only
    assert not state.offloads.udp4_receive
    assert state.offloads.udp6_receive


def test_encapsulation_leaves_off_what_a_keyword_has_switched_off() -> None:
    state = adapter()
    oids.set_value(state, 0x0001021B, configuration("*TCPChecksumOffloadIPv4", "2"))
    oids.set_value(state, 0x0001021B, configuration("*LsoV2IPv6", "0"))
    oids.set_value(state, 0x0101010A, encapsulation(*OFF, *OFF))
    oids.set_value(state, 0x0101010A, encapsulation(*ETHERNET_ON, *ETHERNET_ON))
    assert state.offloads == state.first.but({"tcp4_send": False, "lso6": False})
    oids.set_value(state, 0x0001021B, configuration("*LsoV2IPv6", "1"))
    state.reset()
    oids.set_value(state, 0x0101010A, encapsulation(*ETHERNET_ON, *ETHERNET_ON))
    assert state.offloads == state.first


@pytest.mark.parametrize("words", [(1, 1, 14), (1, 2, 18), (0, 0, 0, 1, 4, 14), (0, 0, 0, 1, 2, 0)])
def test_an_encapsulation_that_is_not_ethernets(words: tuple[int, ...]) -> None:
    state = adapter()
    with pytest.raises(OidDataInvalid):
        oids.set_value(state, 0x0101010A, encapsulation(*words))
    assert state.offloads == state.first


def test_the_encapsulation() -> None:
    data = oids.query(adapter(), 0x0101010A, b"")
    assert struct.unpack("<BBH6I", data) == (0xA8, 1, 28, *ETHERNET_ON, *ETHERNET_ON)


# -- receive-side scaling --------------------------------------------------------------------------

KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)


def scaling(
    table: tuple[int, ...] = tuple(n % 4 for n in range(128)),
    *,
    flags: int = 0,
    info: int = 0x1701,
    kind: int = 0x89,
    revision: int = 2,
    table_size: int | None = None,
    table_at: int = 40,
    key_size: int = 40,
    key_at: int | None = None,
) -> bytes:
    """NDIS_RECEIVE_SCALE_PARAMETERS as Linux lays it out."""
    size = 4 * len(table)
    head = struct.pack(
        "<BBH HHI HxxI HxxI III", kind, revision, 40, flags, 0, info,
        size if table_size is None else table_size, table_at,
        key_size, 40 + size if key_at is None else key_at, 0, 0, 0,
    )  # fmt: skip
    return head + struct.pack(f"<{len(table)}I", *table) + KEY


def test_scaling_as_linux_sets_it() -> None:
    state = adapter()
    asked = struct.pack("<BBHIIIH", 0x88, 2, 18, 0, 0, 0, 0)
    kind, revision, size, flags, _, queues, entries = struct.unpack(
        "<BBHIIIH", oids.query(state, 0x00010203, asked)
    )
    assert (kind, revision, size, queues, entries) == (0x88, 2, 18, 4, 128)
    assert flags & 0x301 == 0x301
    assert len(oids.query(state, 0x00010203, b"")) == 20
    assert oids.set_value(state, 0x00010204, scaling(flags=0x10)) is Change.SCALING
    assert not state.scaling.current.enabled
    oids.set_value(state, 0x00010204, scaling())
    now = state.scaling.current
    assert now.enabled
    assert (now.types, now.key) == (0x1700, KEY)
    told = oids.query(state, 0x00010204, b"")
    assert told[40:] == struct.pack("<128I", *(n % 4 for n in range(128))) + KEY
    oids.set_value(state, 0x00010204, scaling((1,) * 64, flags=0x0A))
    assert state.scaling.current.table == (1,) * 64
    assert state.scaling.current.key == now.key
    assert state.scaling.current.types == now.types
    oids.set_value(state, 0x00010204, scaling((3,), flags=0x04))
    assert state.scaling.current.table == (1,) * 64
    state.reset()
    assert not state.scaling.current.enabled


@pytest.mark.parametrize(
    "data",
    [
        scaling((4,)),
        scaling((0, 0xFFFFFFFF)),
        scaling((0,) * 129),
        scaling(()),
        scaling(table_size=3),
        scaling(table_size=510),
        scaling(table_at=27),
        scaling(table_at=0xFFFFFFFC),
        scaling((0,), table_size=512),
        scaling(key_size=39),
        scaling(key_size=41),
        scaling(key_at=0xFFFFFFF0),
        scaling(key_at=40 + 512 + 1),
        scaling(key_at=0),
        scaling(info=0x1702),
    ],
)
def test_scaling_that_cannot_be(data: bytes) -> None:
    state = adapter()
    oids.set_value(state, 0x00010204, scaling())
    before = state.scaling.current
    with pytest.raises(OidDataInvalid):
        oids.set_value(state, 0x00010204, data)
    assert state.scaling.current is before


@pytest.mark.parametrize("header", [(0x88, 2), (0x89, 0), (0, 0)])
def test_the_header_of_scaling_is_not_looked_at(header: tuple[int, int]) -> None:
    state = adapter()
    oids.set_value(state, 0x00010204, scaling(kind=header[0], revision=header[1]))
    assert state.scaling.current.enabled


def test_scaling_without_a_hash_function_is_switched_off() -> None:
    state = adapter()
    oids.set_value(state, 0x00010204, scaling())
    assert state.scaling.current.enabled
    oids.set_value(state, 0x00010204, scaling(info=0x1700))
    assert not state.scaling.current.enabled
    oids.set_value(state, 0x00010204, struct.pack("<BBH", 0x89, 2, 40) + bytes(24))
    assert not state.scaling.current.enabled


# -- what NDIS 6 has -------------------------------------------------------------------------------


def test_the_link_as_ndis_6_asks_for_it() -> None:
    counters = Counters()
    counters.received.directed_bytes = 1 << 33
    counters.sent.broadcast_bytes = (1 << 33) + 1
    state = adapter(counters=counters)
    for connected, media in ((True, 1), (False, 2)):
        state.connected = connected
        data = oids.query(state, 0x00010207, b"")
        assert len(data) == 40
        assert struct.unpack("<BBHII4xQQII", data) == (
            0x80, 1, 40, media, 2, 10_000_000_000, 10_000_000_000, 0, 0,
        )  # fmt: skip
    assert oids.query(state, 0x00010206, b"") == struct.pack("<QQ", 10**10, 10**10)
    assert oids.query(state, 0x00020219, b"") == struct.pack("<Q", 1 << 33)
    assert oids.query(state, 0x0002021A, b"") == struct.pack("<Q", (1 << 33) + 1)
    for oid in (0x00010208, 0x00010118):
        for data in (b"", bytes(32), bytes(500)):
            assert oids.set_value(state, oid, data) is Change.NOTHING


def test_the_version_has_two_bytes_and_tags_are_an_ability() -> None:
    assert oids.query(adapter(), 0x00010110, b"") == struct.pack("<H", 0x0600)
    assert number(0x00010113) & 0x248 == 0x248
