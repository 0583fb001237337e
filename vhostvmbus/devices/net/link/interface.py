# SPDX-License-Identifier: GPL-2.0-or-later
"""Asks the kernel about an interface, and changes it, through netlink (pyroute2).

Every function works in the calling thread's network namespace and raises ``OSError``.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pyroute2 import IPRoute

from vhostvmbus.devices.net.link import LinkDown
from vhostvmbus.devices.net.link.namespace import kernel_errors

_UP: Final = 0x1
_LOWER_UP: Final = 0x10000
"""``linux/if.h``: switched on by the administrator; has a carrier."""
_NO_DAD: Final = 0x02
"""``linux/if_addr.h``: the address is good at once."""
_NO_SUCH_DEVICE: Final = 19


@dataclass(frozen=True, slots=True)
class State:
    """An interface at one moment; ``mtu`` in bytes."""

    index: int
    name: str
    carrier: bool
    mtu: int
    master: int | None
    """The index of the bridge that it is in."""


def look(route: IPRoute, index: int) -> State | None:
    """Returns the interface ``index``, or ``None`` if there is none."""
    try:
        with kernel_errors():
            found = list(route.get_links(index))
    except OSError as error:
        if error.errno == _NO_SUCH_DEVICE:
            return None
        raise
    if not found:
        return None
    both = _UP | _LOWER_UP
    return State(
        index,
        str(found[0].get_attr("IFLA_IFNAME")),
        int(found[0]["flags"]) & both == both,
        int(found[0].get_attr("IFLA_MTU")),
        found[0].get_attr("IFLA_MASTER"),
    )


def find(name: str) -> int | None:
    """Returns the index of the interface ``name``."""
    with kernel_errors(), IPRoute() as route:
        found = list(route.link_lookup(ifname=name))
    return int(found[0]) if found else None


def find_bridge(route: IPRoute, name: str) -> int | None:
    """Returns the index of the bridge ``name``, or ``None`` if there is none."""
    with kernel_errors():
        for index in route.link_lookup(ifname=name):
            (there,) = route.get_links(index)
            if there.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") == "bridge":
                return int(index)
    return None


def join(route: IPRoute, index: int, bridge: str, mtu: int | None) -> None:
    """Puts an interface into ``bridge``, with the bridge's MTU if ``mtu`` is ``None``.

    Raises LinkDown if there is no such bridge.
    """
    master = find_bridge(route, bridge)
    state = None if master is None else look(route, master)
    if state is None:
        raise LinkDown(
            f"there is no bridge {bridge}; to make one: ip link add {bridge} type bridge"
        )
    with kernel_errors():
        route.link("set", index=index, mtu=mtu or state.mtu)
        route.link("set", index=index, master=master)


def configure(
    index: int,
    *,
    mac: bytes,
    mtu: int | None,
    bridge: str | None,
    addresses: Sequence[str] = (),
) -> State:
    """Gives an interface what it was made for and switches it on. Returns how it is then.

    ``mac`` is its station address, 6 bytes. Without ``mtu`` it has its bridge's, or else what the
    kernel gave it.
    """
    with kernel_errors(), IPRoute() as route:
        route.link("set", index=index, address=mac.hex(":"))
        if bridge is not None:
            join(route, index, bridge, mtu)
        elif mtu is not None:
            route.link("set", index=index, mtu=mtu)
        for text in addresses:
            address = ipaddress.ip_interface(text)
            route.addr(
                "add",
                index=index,
                address=str(address.ip),
                prefixlen=address.network.prefixlen,
                flags=_NO_DAD if address.version == 6 else 0,
            )
        route.link("set", index=index, state="up")
        state = look(route, index)
    if state is None:
        raise LinkDown("the interface vanished while it was made")
    return state


def set_mtu(index: int, mtu: int) -> None:
    """Changes an interface's MTU."""
    with kernel_errors(), IPRoute() as route:
        route.link("set", index=index, mtu=mtu)
