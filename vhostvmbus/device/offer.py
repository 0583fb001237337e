# SPDX-License-Identifier: GPL-2.0-or-later
"""The offer of a device, from what its class says of it."""

from vhostvmbus.device.device import Device
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.vmbus import CHANNEL_FLAGS_MASK


def offer_of(device: Device) -> Offer:
    """Returns the offer. Raises :exc:`ValueError` for limits or flags that make no sense."""
    for name in (
        "transaction_quota",
        "max_packet_size",
        "max_external_data",
        "max_external_ranges",
    ):
        if getattr(device, name) < 1:
            raise ValueError(f"{name} must be at least 1")
    # A front end may meet flags that are newer than itself; a device's author has none of them.
    unknown = device.channel_flags & ~CHANNEL_FLAGS_MASK
    if unknown:
        raise ValueError(f"channel_flags has unknown bits {unknown:#x}")
    return Offer(
        device.class_id,
        device.instance_id,
        device.channel_flags,
        device.mmio_megabytes,
        device.channels,
        device.max_channels,
        device.user_defined,
    )
