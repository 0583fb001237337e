# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m vhostvmbus``: the same as the command ``vhostvmbus``."""

import sys

from vhostvmbus.cli import main

sys.exit(main())
