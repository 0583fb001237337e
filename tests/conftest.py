# SPDX-License-Identifier: GPL-2.0-or-later
"""Property tests try the same examples each time, so that a change is judged by what it changed;
``make soak`` (``VHOSTVMBUS_SOAK=1``) looks for new ones.

Tests send SIGINT to programs. A shell starts background jobs with SIGINT ignored, and so would be
all that they start; with a handler here it is not.
"""

import os
import signal

from hypothesis import settings

settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("new", max_examples=1000)
settings.load_profile("new" if os.environ.get("VHOSTVMBUS_SOAK") == "1" else "same")
signal.signal(signal.SIGINT, signal.default_int_handler)
