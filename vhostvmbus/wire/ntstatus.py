# SPDX-License-Identifier: GPL-2.0-or-later
"""NTSTATUS values that cross the wire (reply-acks, open results, completions).

Source: [MS-ERREF] section 2.3.1. The names keep Microsoft's spelling without ``STATUS_``.
"""

from enum import IntEnum


class NtStatus(IntEnum):
    """A 32-bit NTSTATUS. The top two bits are the severity: 0 success, 3 error."""

    SUCCESS = 0x00000000
    PENDING = 0x00000103
    BUFFER_OVERFLOW = 0x80000005
    UNSUCCESSFUL = 0xC0000001
    NOT_IMPLEMENTED = 0xC0000002
    INVALID_HANDLE = 0xC0000008
    INVALID_PARAMETER = 0xC000000D
    NO_SUCH_DEVICE = 0xC000000E
    INVALID_DEVICE_REQUEST = 0xC0000010
    MORE_PROCESSING_REQUIRED = 0xC0000016
    NO_MEMORY = 0xC0000017
    CONFLICTING_ADDRESSES = 0xC0000018
    ACCESS_DENIED = 0xC0000022
    BUFFER_TOO_SMALL = 0xC0000023
    OBJECT_NAME_COLLISION = 0xC0000035
    QUOTA_EXCEEDED = 0xC0000044
    INSUFFICIENT_RESOURCES = 0xC000009A
    DEVICE_NOT_CONNECTED = 0xC000009D
    DEVICE_NOT_READY = 0xC00000A3
    NOT_SUPPORTED = 0xC00000BB
    INTERNAL_ERROR = 0xC00000E5
    CANCELLED = 0xC0000120
    DEVICE_REMOVED = 0xC00002B6
    INVALID_DEVICE_STATE = 0xC0000184
    IO_DEVICE_ERROR = 0xC0000185
    IO_TIMEOUT = 0xC00000B5
    REVISION_MISMATCH = 0xC0000059

    @property
    def is_error(self) -> bool:
        """Whether the severity bits say *error*."""
        return self.value >> 30 == 3
