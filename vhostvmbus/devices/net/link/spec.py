# SPDX-License-Identifier: GPL-2.0-or-later
"""Understands a user's words for what a card is connected to.

    user[,hostfwd=tcp:[ADDRESS:]HOSTPORT:GUESTPORT]...[,mtu=N]
    tap[,ip=ADDRESS/LENGTH]...[,bridge=NAME][,mtu=N][,queues=N]
    tap:NAME[,mtu=N][,queues=N]
    bridge:NAME[,mtu=N][,queues=N]
    netns:NAME[,ip=ADDRESS/LENGTH]...[,mtu=N][,queues=N]
    none

each with ``,mac=xx:xx:xx:xx:xx:xx`` and ``,pcap=FILE``. Pure:
:mod:`~vhostvmbus.devices.net.link.opening` is what makes things on the host.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from vhostvmbus.engine import lib

MIN_MTU: Final = 576
"""The smallest MTU in bytes, which every IPv4 host has to take (RFC 791)."""
MAX_MTU: Final = 65520
"""The largest MTU in bytes: an IP packet of 65535 less an Ethernet header, in whole words."""
MAX_QUEUES: Final[int] = lib.VVB_NET_CHANNELS
_KEYS: Final = {
    "user": {"hostfwd", "mtu"},
    "tap": {"ip", "bridge", "mtu", "queues"},
    "tap:": {"mtu", "queues"},
    "bridge:": {"mtu", "queues"},
    "netns:": {"ip", "mtu", "queues"},
    "none": set(),
}
_COMMON: Final = {"mac", "pcap"}
_REPEATABLE: Final = {"ip", "hostfwd"}
_INTERFACE: Final = re.compile(r"(?!\.\.?$)[^\s/:%,]{1,15}")
"""An interface's name: ``dev_valid_name`` of Linux, and no pattern."""
_NAMESPACE: Final = re.compile(r"(?!\.\.?$)[A-Za-z0-9._+-]{1,64}")


class SpecError(ValueError):
    """A link that cannot be understood; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Forward:
    """A port of the host that leads into the guest."""

    protocol: str
    """Either "tcp" or "udp"."""
    address: str
    host_port: int
    guest_port: int


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """A link as it was asked for.

    ``kind`` is "user", "tap", "netns" or "none"; "bridge:NAME" is a tap.
    """

    kind: str
    name: str | None = None
    """The name of an existing TAP, or of a network namespace."""
    mac: bytes | None = None
    pcap: str | None = None
    mtu: int | None = None
    queues: int | None = None
    bridge: str | None = None
    addresses: tuple[str, ...] = ()
    """The addresses, each with a slash and the length of its prefix."""
    forwards: tuple[Forward, ...] = ()


def parse(text: str) -> LinkSpec:
    """Understands ``text``. Raises :class:`SpecError`."""
    what, *options = text.split(",")
    kind, colon, name = what.partition(":")
    keys = _KEYS.get(kind + colon)
    if keys is None:
        if kind + ":" in _KEYS:
            raise SpecError(f"{what}: which one? write {kind}:NAME")
        known = "user, tap, tap:NAME, bridge:NAME, netns:NAME, none"
        raise SpecError(f"network {what or '(empty)'}: there are {known}")
    if colon:
        _check_name(kind, name)
    values: dict[str, list[str]] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in keys | _COMMON:
            known = ", ".join(sorted(keys | _COMMON))
            raise SpecError(f"{text}: {kind} has no option {key or '(empty)'}; it has {known}")
        if not equals or not value:
            raise SpecError(f"{text}: {key} needs a value, {key}=...")
        if key in values and key not in _REPEATABLE:
            raise SpecError(f"{text}: {key} is given twice")
        values.setdefault(key, []).append(value)
    bridge = values.get("bridge", [None])[0]
    if bridge is not None:
        _check_name("bridge", bridge)
    if kind == "bridge":
        kind, bridge, name = "tap", name, ""
    if bridge is not None and "ip" in values:
        raise SpecError(f"{text}: an address belongs to the bridge, not to what is in it")
    mac, pcap = values.get("mac"), values.get("pcap")
    return LinkSpec(
        kind=kind,
        name=name or None,
        mac=_mac(mac[0]) if mac else None,
        pcap=pcap[0] if pcap else None,
        mtu=_number("mtu", values, MIN_MTU, MAX_MTU),
        queues=_number("queues", values, 1, MAX_QUEUES),
        bridge=bridge,
        addresses=tuple(_address(value) for value in values.get("ip", ())),
        forwards=tuple(_forward(value) for value in values.get("hostfwd", ())),
    )


def _check_name(kind: str, name: str) -> None:
    good = _NAMESPACE if kind == "netns" else _INTERFACE
    if not good.fullmatch(name):
        thing = "a namespace" if kind == "netns" else "an interface"
        raise SpecError(f"{kind}:{name}: not a name that {thing} can have")


def _number(key: str, values: dict[str, list[str]], low: int, high: int) -> int | None:
    if key not in values:
        return None
    return _integer(key, values[key][0], low, high)


def _integer(what: str, text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and low <= int(text) <= high):
        raise SpecError(f"{what} {text}: a number from {low} to {high} is wanted")
    return int(text)


def _mac(text: str) -> bytes:
    if not re.fullmatch(r"[0-9A-Fa-f]{2}([:-][0-9A-Fa-f]{2}){5}", text):
        raise SpecError(f"mac {text}: write it like 52:54:00:12:34:56")
    mac = bytes.fromhex(re.sub("[:-]", "", text))
    if mac[0] & 1 or not any(mac):
        raise SpecError(f"mac {text}: not the address of one station")
    return mac


def _address(text: str) -> str:
    try:
        if "/" not in text:
            raise ValueError
        address = ipaddress.ip_interface(text)
    except ValueError:
        raise SpecError(f"ip {text}: write it like 10.0.0.1/24 or fd00::1/64") from None
    return str(address)


def _forward(text: str) -> Forward:
    found = re.fullmatch(r"(tcp|udp):(?:([0-9.]+|\[[0-9A-Fa-f:.]+\]):)?([0-9]+):([0-9]+)", text)
    if not found:
        raise SpecError(
            f"hostfwd {text}: write it like tcp:2222:22, or tcp:192.0.2.1:2222:22 for another "
            "address of the host than 127.0.0.1"
        )
    protocol, address, host_port, guest_port = found.groups()
    try:
        parsed = ipaddress.ip_address((address or "127.0.0.1").strip("[]"))
    except ValueError:
        raise SpecError(f"hostfwd {text}: {address} is no address") from None
    return Forward(
        protocol,
        str(parsed),
        _integer("host port", host_port, 1, 65535),
        _integer("guest port", guest_port, 1, 65535),
    )
