# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds the engine, ``vhostvmbus._engine`` (cffi, API mode). Used by the package's setup.py.

A device's data path in C becomes part of the same module. The build takes what stands in the
device's ``native/`` folder: ``*.c``, and ``*api.h`` with the declarations that Python sees, plain
ones like the engine's own ``api.h``. Nothing here names a device.

The same C files make the sanitizer builds and the fuzz targets: see docs/engine.md.
"""

from pathlib import Path

from cffi import FFI

PACKAGE = Path(__file__).resolve().parents[1]
CFLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")
HARDENING_CFLAGS = ("-fstack-protector-strong", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2")
HARDENING_LDFLAGS = ("-Wl,-z,relro,-z,now,-z,noexecstack",)
"""Options that make a mistake of ours harder to use for a hostile guest: a return address and what
the linker has resolved cannot be overwritten, and copies of known size are checked. The builds with
sanitizers, which look themselves, go without."""
GLUE_CFLAGS = ("-Wno-unused-parameter", "-Wno-missing-field-initializers")
"""The code that cffi generates is not ours to warn about."""


def native_folders() -> list[Path]:
    """Returns the engine's folder, and behind it those of the devices that have C of their own."""
    return [PACKAGE / "engine", *sorted(PACKAGE.glob("devices/*/native"))]


def interfaces() -> list[Path]:
    """Returns the headers that declare what Python sees, the engine's first."""
    return [header for folder in native_folders() for header in sorted(folder.glob("*api.h"))]


def _relative(path: Path) -> str:
    """Returns the path from the folder of setup.py, as setuptools wants it."""
    return str(path.relative_to(PACKAGE.parent))


def _files(pattern: str) -> list[str]:
    return [_relative(path) for folder in native_folders() for path in sorted(folder.glob(pattern))]


ffibuilder = FFI()
for header in interfaces():
    ffibuilder.cdef(header.read_text())
ffibuilder.set_source(
    "vhostvmbus._engine",
    '#include "engine.h"\n' + "".join(f'#include "{path.name}"\n' for path in interfaces()[1:]),
    sources=_files("*.c"),
    depends=_files("*.h"),
    include_dirs=[_relative(folder) for folder in native_folders()],
    extra_compile_args=[*CFLAGS, *HARDENING_CFLAGS, *GLUE_CFLAGS],
    extra_link_args=["-pthread", *HARDENING_LDFLAGS],
)
