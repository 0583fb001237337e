# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``vhostvmbus`` command. Reads arguments, prints, and leaves the work to the rooms below."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from vhostvmbus.cli import serve, vm


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; everything unwinds as after a Ctrl-C."""


def _on_signal(number: int, frame: object) -> None:
    raise Terminated


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="vhostvmbus",
        description="VMBus devices in Python, outside the hypervisor, for QEMU.",
    )
    parser.add_argument("--version", action="version", version=version("vhostvmbus"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve.add_command(commands)
    vm.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    options = make_parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    try:
        status = options.run(options)
    except Terminated:
        status = 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print(file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has gone; say nothing more, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    return int(status)
