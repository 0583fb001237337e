# SPDX-License-Identifier: GPL-2.0-or-later
"""The words of a guest that opens a channel: docs/vhost-user-vmbus.md, *VMBUS_OPEN*.

One value on its whole way: a connection reads it from the request, a device host opens the channel
by it, and the channel keeps it.
"""

from dataclasses import dataclass

from vhostvmbus.wire.vmbus import USER_DATA_SIZE


@dataclass(frozen=True, slots=True)
class Opening:
    """The opening of channel ``index``, whose rings are in the GPADL ``gpadl_id``.

    The in ring begins at page ``ring_offset`` of it. ``version`` has the major number in the high
    16 bits. ``user_data`` is padded with zeros to 120 bytes; :exc:`ValueError` for more.
    ``resumed``: the guest has had the channel open all along, and only the connection is new.
    """

    index: int
    gpadl_id: int
    ring_offset: int
    target_vp: int = 0
    version: int = 0
    user_data: bytes = b""
    resumed: bool = False

    def __post_init__(self) -> None:
        if len(self.user_data) > USER_DATA_SIZE:
            raise ValueError(f"user_data has {len(self.user_data)} bytes, at most {USER_DATA_SIZE}")
        object.__setattr__(self, "user_data", self.user_data.ljust(USER_DATA_SIZE, b"\0"))
