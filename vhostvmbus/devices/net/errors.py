# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest's mistakes in the network protocol, as values.

Each costs the guest the packet, the message or the frame that it is in, and is counted by its
name; none stops a channel. ``offset`` counts from the start of the structure that ``field`` is in.
"""

from typing import ClassVar

from vhostvmbus.devices.net import status
from vhostvmbus.wire.errors import PacketError


class NetError(PacketError):
    """The base of the network card's errors."""


class NvspError(NetError):
    """An NVSP message that is cut short, unknown, or not for this version or this moment."""


class SectionError(NetError):
    """A section index or size outside of the send buffer, or a buffer that makes no sections."""


class RndisError(NetError):
    """An RNDIS message whose lengths and offsets do not fit together."""


class PacketInfoError(RndisError):
    """A chain of per-packet information that leads nowhere."""


class FrameError(NetError):
    """A frame that is too short or too long, or whose headers do not fit the offload asked for."""


class ReturnError(NetError):
    """The guest returned receive sections with something that is no completion, nor empty."""


class OidError(NetError):
    """A query or set that cannot be granted; ``rndis_status`` answers it."""

    rndis_status: ClassVar[int] = status.FAILURE


class OidUnknown(OidError):
    """A query or set of an OID that is unknown here, or not in this direction."""

    rndis_status = status.NOT_SUPPORTED


class OidLengthInvalid(OidError):
    """A query or set with less information than the OID takes."""

    rndis_status = status.INVALID_LENGTH


class OidDataInvalid(OidError):
    """A query or set with information that says something that cannot be."""

    rndis_status = status.INVALID_DATA
