# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs the benchmarks that are named, or all: ``python -m benchmarks [--seconds S] [NAME ...]``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

import benchmarks
from benchmarks.table import Bystanders, machine
from vhostvmbus.vm.errors import VmError

QUIET = 0.05
"""The part of the processors' time that others may use without spoiling the figures."""


def names() -> list[str]:
    """Returns the modules in here that measure something."""
    found = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
    return sorted(
        name
        for name in found
        if not name.startswith("_")
        and hasattr(importlib.import_module(f"benchmarks.{name}"), "tables")
    )


def main() -> None:
    """Measures and prints."""
    known = names()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"which ones, of: {', '.join(known)}")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    arguments = parser.parse_args()
    unknown = set(arguments.name) - set(known)
    if unknown:
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}")
    chosen = [importlib.import_module(f"benchmarks.{name}") for name in arguments.name or known]
    try:
        for module in chosen:
            if hasattr(module, "prepare"):
                module.prepare()
    except VmError as error:
        sys.exit(f"python -m benchmarks: {error}")
    print(f"Machine: {machine()}", flush=True)
    bystanders = Bystanders()
    for module in chosen:
        for table in module.tables(arguments.seconds):
            print(f"\n{table}", flush=True)
    if bystanders.share > QUIET:
        print(
            f"\nOther processes used {bystanders.share:.0%} of the processors meanwhile: "
            "these figures are too low."
        )


if __name__ == "__main__":
    main()
