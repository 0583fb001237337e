# SPDX-License-Identifier: GPL-2.0-or-later
"""The work that the card does for the guest: the NDIS offload structures, and what is in force.

Layouts: NDIS_OFFLOAD and NDIS_OFFLOAD_PARAMETERS of the Windows driver documentation; Linux
``hyperv_net.h``, ``struct ndis_offload`` and ``ndis_offload_params``. Little-endian, naturally
aligned. A structure of an older NDIS version is the beginning of the newer one; the header says
which, and an answer is as long as the question's header said.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Final

from vhostvmbus.devices.net.errors import OidDataInvalid, OidLengthInvalid
from vhostvmbus.devices.net.link import Capabilities

OFFLOAD_TYPE: Final = 0xA7
ENCAPSULATION_TYPE: Final = 0xA8
DEFAULT_TYPE: Final = 0x80
SIZES: Final = {1: 112, 2: 144, 3: 156}
"""The bytes of NDIS_OFFLOAD by revision: NDIS 6.0, 6.1, 6.30."""
MIN_PARAMETERS: Final = 15
"""The bytes of NDIS_OFFLOAD_PARAMETERS up to the last of the settings that NDIS 6.0 had."""
MAX_LARGE_SEND: Final = 0xF53C
"""The bytes in a large send, as Hyper-V has it; with all headers it is still an IP packet."""
MIN_SEGMENTS: Final = 2
_ENCAPSULATION_802_3: Final = 2
_ETHERNET_HEADER: Final = 14
_IPV4_TX: Final = 0x001 | 0x004 | 0x010 | 0x040 | 0x100
"""The bits for IP and TCP options, TCP, UDP, and the IP header."""
_IPV6_TX: Final = 0x001 | 0x004 | 0x010 | 0x040
_IPV4_RX: Final = 0x004 | 0x010 | 0x040
_IPV6_RX: Final = 0x001 | 0x004 | 0x010 | 0x040
_LSO_IPV6_OPTIONS: Final = 0x001 | 0x004

_NO_CHANGE: Final = 0
_DISABLED: Final = 1
_FEATURE_ENABLED: Final = 2
_TX_ONLY: Final = 2
_RX_ONLY: Final = 3
_BOTH: Final = 4

_SET_ON: Final = 1
_SET_OFF: Final = 2
_FAMILIES: Final = (
    ("ip_checksum", "tcp4_send", "tcp4_receive", "udp4_send", "udp4_receive", "lso4"),
    ("tcp6_send", "tcp6_receive", "udp6_send", "udp6_receive", "lso6"),
)
"""The offloads that an encapsulation is set for: of IPv4, of IPv6."""
_KEYWORDS: Final = {
    "*IPChecksumOffloadIPv4": ("ip_checksum", None),
    "*TCPChecksumOffloadIPv4": ("tcp4_send", "tcp4_receive"),
    "*TCPChecksumOffloadIPv6": ("tcp6_send", "tcp6_receive"),
    "*UDPChecksumOffloadIPv4": ("udp4_send", "udp4_receive"),
    "*UDPChecksumOffloadIPv6": ("udp6_send", "udp6_receive"),
}
"""Keywords of a driver's settings ("Standardized INF Keywords" of the Windows driver
documentation), with what their bit 0 switches, and what their bit 1.
"""
_LARGE_KEYWORDS: Final = {"*LsoV2IPv4": "lso4", "*LsoV2IPv6": "lso6"}

_HEADER = struct.Struct("<BBH")
_ENCAPSULATION = struct.Struct("<BBH6I")
_SETTINGS = struct.Struct("<4x11B")
_RSC_AT: Final = 22


@dataclass(frozen=True, slots=True)
class Offloads:
    """A choice of offloads: those in force, those that can be."""

    ip_checksum: bool = False
    tcp4_send: bool = False
    tcp4_receive: bool = False
    udp4_send: bool = False
    udp4_receive: bool = False
    tcp6_send: bool = False
    tcp6_receive: bool = False
    udp6_send: bool = False
    udp6_receive: bool = False
    lso4: bool = False
    lso6: bool = False
    rsc4: bool = False
    rsc6: bool = False

    @classmethod
    def all_of(cls, able: Capabilities, coalescing: bool) -> Offloads:
        """Returns all offloads that can be."""
        csum = able.checksum
        lso4, lso6 = csum and able.tso4, csum and able.tso6
        checksums = (csum,) * 9
        return cls(*checksums, lso4, lso6, coalescing and lso4, coalescing and lso6)

    def but(self, settings: dict[str, bool]) -> Offloads:
        """Returns these, some of them set otherwise, by name."""
        return replace(self, **settings)

    def within(self, able: Offloads) -> Offloads:
        """Returns those that ``able`` has, too."""
        return Offloads(*(getattr(self, name) and getattr(able, name) for name in self.__slots__))

    def without(self, barred: Offloads) -> Offloads:
        """Returns those that ``barred`` has not."""
        left = (getattr(self, name) and not getattr(barred, name) for name in self.__slots__)
        return Offloads(*left)

    @property
    def receive(self) -> Capabilities:
        """The work that the link may leave undone in received frames."""
        checked = (
            self.tcp4_receive and self.udp4_receive and self.tcp6_receive and self.udp6_receive
        )
        return Capabilities(checked, checked and self.rsc4, checked and self.rsc6)


def describe(offloads: Offloads, revision: int) -> bytes:
    """Returns NDIS_OFFLOAD of that revision."""

    def transmit(options: int, tcp: bool, udp: bool, ip: bool) -> int:
        wanted = options & ~0x150
        wanted |= (0x010 if tcp else 0) | (0x040 if udp else 0) | (0x100 if ip else 0)
        return wanted & options if tcp or udp or ip else 0

    def encapsulation(flags: int) -> int:
        return _ENCAPSULATION_802_3 if flags else 0

    has = offloads
    ip4_tx = transmit(_IPV4_TX, has.tcp4_send, has.udp4_send, has.ip_checksum)
    ip4_rx = transmit(_IPV4_RX, has.tcp4_receive, has.udp4_receive, False)
    ip6_tx = transmit(_IPV6_TX, has.tcp6_send, has.udp6_send, False)
    ip6_rx = transmit(_IPV6_RX, has.tcp6_receive, has.udp6_receive, False)
    checksums = [item for flags in (ip4_tx, ip4_rx, ip6_tx, ip6_rx)
                 for item in (encapsulation(flags), flags)]  # fmt: skip
    large = []
    for enabled in (has.lso4, has.lso6):
        large += [_ENCAPSULATION_802_3, MAX_LARGE_SEND, MIN_SEGMENTS] if enabled else [0, 0, 0]
    large.append(_LSO_IPV6_OPTIONS if has.lso6 else 0)
    size = SIZES[revision]
    whole = _HEADER.pack(OFFLOAD_TYPE, revision, size) + struct.pack("<8I", *checksums)
    whole += bytes(16 + 28)  # large sends of version 1, IPsec
    whole += struct.pack("<7I", *large) + bytes(4)
    whole = whole.ljust(SIZES[2], b"\0") + bytes([has.rsc4, has.rsc6])
    return whole.ljust(size, b"\0")[:size]


def revision_wanted(information: bytes) -> int:
    """Returns the revision that a query's header asks for; the newest if it has none, or one that
    makes no sense: Windows sends some of those, and looks at the answer's.
    """
    if len(information) < _HEADER.size:
        return max(SIZES)
    kind, revision, size = _HEADER.unpack_from(information)
    fitting = [known for known in SIZES if known <= revision and SIZES[known] <= size]
    return max(fitting) if fitting and kind == OFFLOAD_TYPE else max(SIZES)


def with_parameters(offloads: Offloads, able: Offloads, data: bytes) -> Offloads:
    """Returns what is in force after NDIS_OFFLOAD_PARAMETERS. Raises :class:`OidError`.

    What the card did not offer stays off, and is no mistake: Windows asks for all that it knows.
    """
    if len(data) < MIN_PARAMETERS:
        raise OidLengthInvalid("info_buflen", len(data), 0)
    kind, revision, _ = _HEADER.unpack_from(data)
    if kind != DEFAULT_TYPE or not revision:
        raise OidDataInvalid("header.type", kind, 0)
    settings = _SETTINGS.unpack_from(data)
    ip, tcp4, udp4, tcp6, udp6, _, _, lso4, lso6, _, _ = settings
    for number, value in enumerate(settings):
        if value > _BOTH:
            raise OidDataInvalid("setting", value, 4 + number)
    changed = offloads
    if ip != _NO_CHANGE:
        changed = replace(changed, ip_checksum=ip in (_TX_ONLY, _BOTH))
    for name, value in (("tcp4", tcp4), ("udp4", udp4), ("tcp6", tcp6), ("udp6", udp6)):
        if value != _NO_CHANGE:
            changed = replace(
                changed,
                **{
                    f"{name}_send": value in (_TX_ONLY, _BOTH),
                    f"{name}_receive": value in (_RX_ONLY, _BOTH),
                },
            )
    rsc4, rsc6 = data[_RSC_AT : _RSC_AT + 2] if len(data) >= _RSC_AT + 2 else (0, 0)
    for name, value in (("lso4", lso4), ("lso6", lso6), ("rsc4", rsc4), ("rsc6", rsc6)):
        if value != _NO_CHANGE:
            changed = replace(changed, **{name: value == _FEATURE_ENABLED})
    return changed.within(able)


def keyword(name: str, value: int) -> dict[str, bool]:
    """Returns what a keyword switches on or off, by name; nothing if it is about something else."""
    if name in _LARGE_KEYWORDS:
        return {_LARGE_KEYWORDS[name]: value != 0}
    bits = enumerate(_KEYWORDS.get(name, ()))
    return {switched: bool(value >> bit & 1) for bit, switched in bits if switched}


def describe_encapsulation() -> bytes:
    """Returns NDIS_OFFLOAD_ENCAPSULATION of revision 1: of both versions of IP, Ethernet."""
    ethernet = (_SET_ON, _ENCAPSULATION_802_3, _ETHERNET_HEADER)
    return _ENCAPSULATION.pack(ENCAPSULATION_TYPE, 1, _ENCAPSULATION.size, *ethernet, *ethernet)


def with_encapsulation(offloads: Offloads, able: Offloads, data: bytes) -> Offloads:
    """Returns what is in force after NDIS_OFFLOAD_ENCAPSULATION. Raises :class:`OidError`.

    It switches on all that is ``able``, but for coalescing, or all off, for each version of IP.
    """
    body = data[_HEADER.size : _ENCAPSULATION.size]
    words = struct.unpack_from(f"<{len(body) // 4}I", body)
    if len(words) < 3:
        raise OidLengthInvalid("info_buflen", len(data), 0)
    changed = offloads
    for number, names in enumerate(_FAMILIES[: len(words) // 3]):
        enabled, kind, header = words[3 * number : 3 * number + 3]
        if enabled not in (_SET_ON, _SET_OFF):
            continue
        on = enabled == _SET_ON
        if on and not kind & _ENCAPSULATION_802_3:
            raise OidDataInvalid("encapsulation_type", kind, 8 + 12 * number)
        if on and header != _ETHERNET_HEADER:
            raise OidDataInvalid("header_size", header, 12 + 12 * number)
        changed = changed.but({name: on and getattr(able, name) for name in names})
    return changed
