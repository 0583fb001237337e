# SPDX-License-Identifier: GPL-2.0-or-later
"""GUIDs as VMBus carries them: 16 bytes, the first three fields little-endian.

Source: ``guid_t`` in the guest's ``include/linux/hyperv.h``; the same layout as
:attr:`uuid.UUID.bytes_le`.
"""

from uuid import UUID

NULL_GUID = UUID(int=0)


def guid_to_wire(guid: UUID | None) -> bytes:
    """Returns the 16 wire bytes of ``guid``; ``None`` gives all zero."""
    return (guid or NULL_GUID).bytes_le


def guid_from_wire(data: bytes) -> UUID:
    """Returns the GUID in exactly 16 wire bytes. Raises :exc:`ValueError` for another length."""
    return UUID(bytes_le=bytes(data))
