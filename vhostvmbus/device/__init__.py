# SPDX-License-Identifier: GPL-2.0-or-later
"""The device author's API, and what drives a device.

A device is a subclass of :class:`Device`: class attributes describe it, callbacks do its work
(docs/writing-a-device.md). :class:`DeviceHost` owns its channels and the guest's memory; sockets
are the business of ``vhost_user.server``.
"""

from vhostvmbus.device.device import Device
from vhostvmbus.device.host import DeviceHost
from vhostvmbus.device.offer import Offer
from vhostvmbus.wire.errors import RefuseOpen

__all__ = ["Device", "DeviceHost", "Offer", "RefuseOpen"]
