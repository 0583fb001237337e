# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line of ``vhostvmbus serve net``."""

from __future__ import annotations

import argparse
import atexit
from typing import TYPE_CHECKING
from uuid import UUID, uuid5

from vhostvmbus.devices.net.link import spec

if TYPE_CHECKING:
    from vhostvmbus.devices.net import NetworkCard

HELP = "a network card, connected to user-mode network or to the host's"
CAPABILITIES = ("KILL", "NET_ADMIN", "SYS_ADMIN")
"""Capabilities that closing a link may need, after ``serve`` has given up the others: passt, which
is another user by then, is killed if it does not end; TAPs and namespaces are removed."""
SYSTEM_CALLS = ("execve", "mount", "pivot_root", "setns", "umount2", "unshare")
"""System calls that links make at any time: a namespace is entered; passt is started anew, and
shuts itself in."""
LINK_HELP = (
    "user[,hostfwd=tcp:HOSTPORT:GUESTPORT]..., tap[,ip=ADDRESS/LENGTH][,bridge=NAME][,queues=N], "
    "tap:NAME, bridge:NAME, netns:NAME[,ip=...] or none; "
    "all with [,mtu=N][,mac=MAC][,pcap=FILE] (docs/devices/net.md)"
)


def parsed_link(text: str) -> spec.LinkSpec:
    """Understands ``text``, for argparse."""
    try:
        return spec.parse(text)
    except spec.SpecError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the device's own arguments."""
    parser.add_argument(
        "--link", type=parsed_link, default="user", metavar="LINK", help=f"{LINK_HELP}; user"
    )
    parser.add_argument(
        "--instance-id",
        type=UUID,
        metavar="UUID",
        help="of the VMBus device (default: made from mac=, a TAP's name or the socket's path)",
    )


def make_device(options: argparse.Namespace) -> NetworkCard:
    """Makes the card. Raises what making its link raises."""
    from vhostvmbus.devices.net import NetworkCard
    from vhostvmbus.devices.net.address import address_for
    from vhostvmbus.devices.net.link.opening import open_link

    link = open_link(options.link)
    # What has a name on the host does not go by itself.
    atexit.register(link.close)
    instance = options.instance_id
    wanted: spec.LinkSpec = options.link
    if instance is None and (wanted.mac or (wanted.kind == "tap" and wanted.name)):
        # The address is one that lasts, and no other card's.
        address = wanted.mac or link.mac or address_for(link.name)
        instance = uuid5(NetworkCard.class_id, address.hex(":"))
    return NetworkCard(link, instance_id=instance)
