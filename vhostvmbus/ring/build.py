# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds the engine, ``vhostvmbus._ring`` (cffi, API mode). Used by the package's setup.py.

With it, in the same module, the data paths that devices have in C: their files stay with them, and
the engine's know nothing of them.

The same C files make the sanitizer build and the fuzz target: see docs/engine.md.
"""

from pathlib import Path

from cffi import FFI

FOLDER = Path(__file__).resolve().parent
SOURCES = (
    "guard.c",
    "guestmem.c",
    "extdata.c",
    "plan.c",
    "codemap.c",
    "ringattach.c",
    "ringreceive.c",
    "ringsend.c",
    "inflight.c",
    "inflightopen.c",
    "ringserve.c",
    "waiting.c",
)
NET = Path("vhostvmbus/devices/net/native")
NET_SOURCES = ("headers.c", "sections.c", "transmit.c", "receive.c", "path.c")
CFLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
# cffi's generated glue is not ours to warn about.
GLUE_CFLAGS = ("-Wno-unused-parameter", "-Wno-missing-field-initializers")


def _relative(name: str) -> str:
    """Setuptools wants paths relative to the folder of setup.py."""
    return f"vhostvmbus/ring/{name}"


ffibuilder = FFI()
ffibuilder.cdef((FOLDER / "api.h").read_text())
ffibuilder.cdef((FOLDER.parents[1] / NET / "netapi.h").read_text())
ffibuilder.set_source(
    "vhostvmbus._ring",
    '#include "engine.h"\n#include "netapi.h"',
    sources=[_relative(name) for name in SOURCES] + [str(NET / name) for name in NET_SOURCES],
    depends=[
        *map(_relative, ("api.h", "engine.h", "ringbuf.h", "inflight.h")),
        *(str(NET / name) for name in ("netapi.h", "net.h")),
    ],
    include_dirs=["vhostvmbus/ring", str(NET)],
    extra_compile_args=[*CFLAGS, *GLUE_CFLAGS],
    extra_link_args=["-pthread"],
)
