# SPDX-License-Identifier: GPL-2.0-or-later
"""SCSI commands of a disk: a CDB and a data buffer in, a status and sense data out.

SPC-4 and SBC-3; section numbers stand at the handlers.  The table that maps operation codes to
handlers is :mod:`.table`; :func:`execute` is the only entry.
"""

from vhostvmbus.devices.scsi.commands.execute import Outcome, Status, execute, is_slow

__all__ = ["Outcome", "Status", "execute", "is_slow"]
