# SPDX-License-Identifier: GPL-2.0-or-later
"""The link to nowhere: a card whose cable is not plugged in."""

from collections.abc import Callable

from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.devices.net.link.port import Framing, Port


class NoLink:
    """A link that never has a carrier, never has a frame, and takes none."""

    name = "none"
    queues = 1
    capabilities = Capabilities()

    def __init__(self, mac: bytes | None = None) -> None:
        self.mac = mac
        self.mtu = 1500
        self._port = Port(Framing.DATAGRAM)

    def start(self, changed: Callable[[], None]) -> None:
        """Does nothing: nothing ever changes."""

    def carrier(self) -> bool:
        """Returns false."""
        return False

    def port(self, queue: int) -> Port:
        """Returns a port that is never readable."""
        return self._port

    def use_queues(self, count: int) -> None:
        """Takes one queue, which there is."""
        if count != 1:
            raise ValueError("a link to nowhere has one queue")

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """Takes any offloads: nothing is received."""

    def set_mtu(self, mtu: int) -> None:
        """Takes any MTU."""
        self.mtu = mtu

    def stats(self) -> dict[str, int]:
        """Returns nothing: there is nothing to count."""
        return {}

    def close(self) -> None:
        """Gives the descriptor up."""
        self._port.close()
