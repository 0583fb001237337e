# SPDX-License-Identifier: GPL-2.0-or-later
"""The C engine (``vhostvmbus._engine``), and its fault codes as named errors of ``wire.errors``."""

from typing import TYPE_CHECKING, Final

from vhostvmbus._engine import ffi, lib
from vhostvmbus.wire import errors

if TYPE_CHECKING:
    from vhostvmbus._engine import vvb_fault

__all__ = ["FIELDS", "GUEST_ERRORS", "ffi", "guest_error", "lib"]

GUEST_ERRORS: Final[dict[int, type[errors.GuestError]]] = {
    lib.VVB_E_INDEX: errors.RingIndexInvalid,
    lib.VVB_E_LOST: errors.RingMemoryLost,
    lib.VVB_E_DESC_TRUNCATED: errors.DescriptorTruncated,
    lib.VVB_E_LENGTH: errors.PacketLengthInvalid,
    lib.VVB_E_OFFSET: errors.PacketOffsetInvalid,
    lib.VVB_E_TYPE: errors.PacketTypeUnexpected,
    lib.VVB_E_TOO_LARGE: errors.PacketTooLarge,
    lib.VVB_E_RANGE_COUNT: errors.GpaRangeCountInvalid,
    lib.VVB_E_RANGE_TRUNCATED: errors.GpaRangeTruncated,
    lib.VVB_E_RANGE_EMPTY: errors.GpaRangeEmpty,
    lib.VVB_E_RANGE_TOO_LONG: errors.GpaRangeTooLong,
    lib.VVB_E_PFN: errors.PfnOutsideMemory,
    lib.VVB_E_REPLAYED: errors.PacketReplayedTooOften,
}

FIELDS: Final[dict[int, str]] = {
    lib.VVB_F_NONE: "none",
    lib.VVB_F_WRITE_INDEX: "write_index",
    lib.VVB_F_READ_INDEX: "read_index",
    lib.VVB_F_AVAILABLE: "available",
    lib.VVB_F_LEN8: "len8",
    lib.VVB_F_OFFSET8: "offset8",
    lib.VVB_F_TYPE: "type",
    lib.VVB_F_PAYLOAD_LENGTH: "payload_length",
    lib.VVB_F_RANGE_COUNT: "range_count",
    lib.VVB_F_BYTE_COUNT: "byte_count",
    lib.VVB_F_PFN_COUNT: "pfn_count",
    lib.VVB_F_PFN: "pfn",
    lib.VVB_F_MEMORY: "memory",
    lib.VVB_F_REPLAYS: "replays",
}


def guest_error(code: int, field: int, value: int, offset: int) -> Exception:
    """Returns the exception for a fault of the engine; :exc:`MemoryError` if it ran out of
    memory."""
    if code == lib.VVB_E_NOMEM:
        return MemoryError("the ring engine is out of memory")
    return GUEST_ERRORS[code](FIELDS[field], value, offset)


def error_of(fault: "vvb_fault") -> Exception:
    """Returns the exception for a filled ``struct vvb_fault``."""
    return guest_error(fault.error, fault.field, fault.value, fault.offset)
