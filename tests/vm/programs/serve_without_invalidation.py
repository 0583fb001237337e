# SPDX-License-Identifier: GPL-2.0-or-later
"""``vhostvmbus serve …``, but completions are published without a look at the code map.

The defect that the project does away with, brought back for the tests' sake: they must be able
to see it.
"""

import sys

from vhostvmbus.cli import main
from vhostvmbus.device import DeviceHost


def ignore_code_map(self: DeviceHost, *arguments: object) -> None:
    """In the place of ``DeviceHost.set_code_map``."""


DeviceHost.set_code_map = ignore_code_map  # type: ignore[method-assign]
sys.exit(main(["serve", *sys.argv[1:]]))
