# SPDX-License-Identifier: GPL-2.0-or-later
"""The bytes of VMBus: constants, GUIDs, GPA ranges, NTSTATUS, errors.

Everything here works on plain bytes and integers; nothing does I/O and nothing is imported from
the rooms above. All integers of the wire format are little-endian.
"""
