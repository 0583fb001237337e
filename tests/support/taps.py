# SPDX-License-Identifier: GPL-2.0-or-later
"""Addresses, and the host's side of a TAP, for tests of TAPs of a real kernel."""

import subprocess

from pyroute2 import IPRoute

from vhostvmbus.devices.net.link import Capabilities

HOST, GUEST = bytes([10, 9, 0, 1]), bytes([10, 9, 0, 2])
MAC = bytes.fromhex("525400000001")
ALL = Capabilities(checksum=True, tso4=True, tso6=True)


def interface(name: str) -> dict[str, object] | None:
    """Returns what the kernel says of an interface of this thread's namespace."""
    with IPRoute() as route:
        found = route.link_lookup(ifname=name)
        if not found:
            return None
        state = route.get_links(found[0])[0]
        addresses = [
            f"{entry.get_attr('IFA_ADDRESS')}/{entry['prefixlen']}"
            for entry in route.get_addr(index=found[0])
        ]
        return {
            "index": found[0],
            "up": bool(state["flags"] & 1),
            "mtu": state.get_attr("IFLA_MTU"),
            "master": state.get_attr("IFLA_MASTER"),
            "mac": bytes.fromhex(state.get_attr("IFLA_ADDRESS").replace(":", "")),
            "addresses": addresses,
        }


def change(name: str, **what: object) -> None:
    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=name)[0], **what)


def make_existing(name: str, *, multi_queue: bool) -> None:
    """Makes a persistent TAP, as an administrator makes one."""
    words = ["ip", "tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"]
    subprocess.run([*words, *["multi_queue"] * multi_queue], check=True)
    change(name, state="up")
