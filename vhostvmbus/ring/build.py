# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds the engine, ``vhostvmbus._ring`` (cffi, API mode). Used by the package's setup.py.

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
    "waiting.c",
)
CFLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
# cffi's generated glue is not ours to warn about.
GLUE_CFLAGS = ("-Wno-unused-parameter", "-Wno-missing-field-initializers")


def _relative(name: str) -> str:
    """Setuptools wants paths relative to the folder of setup.py."""
    return f"vhostvmbus/ring/{name}"


ffibuilder = FFI()
ffibuilder.cdef((FOLDER / "api.h").read_text())
ffibuilder.set_source(
    "vhostvmbus._ring",
    '#include "engine.h"',
    sources=[_relative(name) for name in SOURCES],
    depends=[_relative(f"{name}.h") for name in ("api", "engine", "ringbuf", "inflight")],
    include_dirs=["vhostvmbus/ring"],
    extra_compile_args=[*CFLAGS, *GLUE_CFLAGS],
    extra_link_args=["-pthread"],
)
