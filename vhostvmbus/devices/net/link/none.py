# SPDX-License-Identifier: GPL-2.0-or-later
"""The link to nowhere: a card whose cable is not plugged in."""

from collections.abc import Callable, Sequence

from vhostvmbus.devices.net.link import Buffer, Capabilities, Offload
from vhostvmbus.devices.net.link.idle import Slot


class NoLink:
    """Never has a carrier, never has a frame, and takes none."""

    name = "none"
    queues = 1
    capabilities = Capabilities()
    direct = False

    def __init__(self, mac: bytes | None = None) -> None:
        self.mac = mac
        self.mtu = 1500
        self._slot = Slot()

    def start(self, changed: Callable[[], None]) -> None:
        """Nothing ever changes."""

    def carrier(self) -> bool:
        """False."""
        return False

    def fileno(self, queue: int) -> int:
        """A descriptor that is never readable."""
        return self._slot.number

    def receive_into(self, queue: int, buffers: Sequence[memoryview]) -> tuple[int, Offload] | None:
        """None."""
        return None

    def send(self, queue: int, pieces: Sequence[Buffer], offload: Offload) -> bool:
        """False."""
        return False

    def use_queues(self, count: int) -> None:
        """There is one."""
        if count != 1:
            raise ValueError("a link to nowhere has one queue")

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """Nothing is received."""

    def set_mtu(self, mtu: int) -> None:
        """Any will do."""
        self.mtu = mtu

    def stats(self) -> dict[str, int]:
        """Nothing to count."""
        return {}

    def close(self) -> None:
        """Give the descriptor up."""
        self._slot.close()
