# SPDX-License-Identifier: GPL-2.0-or-later
"""Every message by its name, and which ones may travel in which direction."""

from __future__ import annotations

from vhostvmbus.vhost_user.message import (
    BACK_END_REQUESTS,
    F_PROTOCOL_FEATURES,
    FRONT_END_REQUESTS,
    MAX_INVALIDATE_RANGES,
    MAX_PAYLOAD,
    MAX_TABLE_REGIONS,
    OPEN_RESUME,
    REQUIRED_FEATURES,
    BackendRequest,
    ChannelMessage,
    Message,
    ProtocolFeature,
    Request,
    Value,
)
from vhostvmbus.vhost_user.standard import (
    AddMemReg,
    GetFeatures,
    GetInflightFd,
    GetMaxMemSlots,
    GetProtocolFeatures,
    InflightReply,
    MemoryRegion,
    RemMemReg,
    SetBackendReqFd,
    SetFeatures,
    SetInflightFd,
    SetMemTable,
    SetOwner,
    SetProtocolFeatures,
)
from vhostvmbus.vhost_user.vmbus import (
    Close,
    CodeMapRegion,
    Continue,
    GetOffer,
    GpadlCreate,
    GpadlTeardown,
    InvalidateCode,
    Modify,
    OfferChannel,
    OfferReply,
    Open,
    RescindChannel,
    Reset,
    SetCodeMap,
    Suspend,
    Unplug,
)

BACK_END_REPLIES: dict[int, type[Message]] = {
    **dict.fromkeys(FRONT_END_REQUESTS, Value),
    Request.VMBUS_GET_OFFER: OfferReply,
    Request.GET_INFLIGHT_FD: InflightReply,
}
"""The reply to each request on the main socket, by the request's number."""
FRONT_END_REPLIES: dict[int, type[Message]] = dict.fromkeys(BACK_END_REQUESTS, Value)
"""The reply to each request on the back-end channel, by the request's number."""

DeviceWork = (
    AddMemReg
    | RemMemReg
    | SetMemTable
    | SetInflightFd
    | GpadlCreate
    | GpadlTeardown
    | Open
    | Close
    | Modify
    | Reset
    | SetCodeMap
    | Suspend
    | Continue
    | Unplug
)
"""The requests that a :class:`~.backend.BackEnd` carries out, and that a status answers."""

BackEndWork = SetBackendReqFd | DeviceWork
"""The requests that the session leaves to its end of the socket, and that a status answers."""

__all__ = [
    "BACK_END_REPLIES",
    "BACK_END_REQUESTS",
    "FRONT_END_REPLIES",
    "FRONT_END_REQUESTS",
    "F_PROTOCOL_FEATURES",
    "MAX_INVALIDATE_RANGES",
    "MAX_PAYLOAD",
    "MAX_TABLE_REGIONS",
    "OPEN_RESUME",
    "REQUIRED_FEATURES",
    "AddMemReg",
    "BackEndWork",
    "BackendRequest",
    "ChannelMessage",
    "Close",
    "CodeMapRegion",
    "Continue",
    "DeviceWork",
    "GetFeatures",
    "GetInflightFd",
    "GetMaxMemSlots",
    "GetOffer",
    "GetProtocolFeatures",
    "GpadlCreate",
    "GpadlTeardown",
    "InflightReply",
    "InvalidateCode",
    "MemoryRegion",
    "Message",
    "Modify",
    "OfferChannel",
    "OfferReply",
    "Open",
    "ProtocolFeature",
    "RemMemReg",
    "Request",
    "RescindChannel",
    "Reset",
    "SetBackendReqFd",
    "SetCodeMap",
    "SetFeatures",
    "SetInflightFd",
    "SetMemTable",
    "SetOwner",
    "SetProtocolFeatures",
    "Suspend",
    "Unplug",
    "Value",
]
