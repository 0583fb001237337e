# SPDX-License-Identifier: GPL-2.0-or-later
"""The place that devices imported ``Packet`` from before ``vhostvmbus.device`` had it."""

from vhostvmbus.channel import Packet

__all__ = ["Packet"]
