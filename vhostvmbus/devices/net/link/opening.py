# SPDX-License-Identifier: GPL-2.0-or-later
"""Opens the link that a user asked for, as :mod:`~vhostvmbus.devices.net.link.spec` has it."""

from vhostvmbus.devices.net.link import Link
from vhostvmbus.devices.net.link.spec import LinkSpec, parse


def open_link(spec: str | LinkSpec) -> Link:
    """Opens the link that ``spec`` asks for.

    Raises :class:`~vhostvmbus.devices.net.link.spec.SpecError` and what making it raises, which is
    :class:`~vhostvmbus.devices.net.link.LinkDown` with a message for the user.
    """
    if isinstance(spec, str):
        spec = parse(spec)
    link = _make(spec)
    if spec.pcap is None:
        return link
    from vhostvmbus.devices.net.link.pcap import Recorded

    try:
        return Recorded(link, spec.pcap)
    except BaseException:
        link.close()
        raise


def _make(spec: LinkSpec) -> Link:
    """Makes the link. Each module is imported only when it is asked for: what it needs may be
    absent.
    """
    if spec.kind == "user":
        from vhostvmbus.devices.net.link.passt import Passt

        return Passt(spec)
    if spec.kind == "none":
        from vhostvmbus.devices.net.link.none import NoLink

        return NoLink(spec.mac)
    from vhostvmbus.devices.net.link.tap import Tap

    return Tap(spec)
