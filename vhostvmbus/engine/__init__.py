# SPDX-License-Identifier: GPL-2.0-or-later
"""The C engine (``vhostvmbus._engine``, cffi in API mode) and its faults as named errors.

``api.h`` is the engine's whole interface, and the one text that the C compiler, cffi and mypy
read, mypy by way of ``_engine.pyi`` (``stub.py``). The rooms above wrap it: ``memory`` guest RAM,
``ring`` rings and plans. A device that has C of its own keeps it in its ``native/`` folder;
``build.py`` finds it there.
"""

from vhostvmbus._engine import ffi, lib

__all__ = ["ffi", "lib"]
