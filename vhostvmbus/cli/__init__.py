# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``vhostvmbus`` command. Reads arguments, prints, and leaves the work to the rooms below."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from vhostvmbus.cli import serve, stats, trial, vm
from vhostvmbus.cli.words import in_words, say


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; everything unwinds as after a Ctrl-C."""


def _on_signal(number: int, frame: object) -> None:
    raise Terminated


class _Version(argparse.Action):
    """``--version``, looked up only when asked for, as a copied package has no metadata."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        print(f"vhostvmbus {version('vhostvmbus')}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="vhostvmbus",
        description="VMBus devices in Python, outside the hypervisor, for QEMU.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="say the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve.add_command(commands)
    trial.add_command(commands)
    stats.add_command(commands)
    vm.add_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = make_parser().parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _on_signal)
    try:
        status = options.run(options)
        sys.stdout.flush()
    except Terminated:
        status = 128 + signal.SIGTERM
    except KeyboardInterrupt:
        print(file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read our output has gone; say nothing more, not even at exit.
        _drop_output()
        status = 128 + signal.SIGPIPE
    except OSError as error:
        say(f"vhostvmbus {options.command}: {in_words(error)}")
        _drop_output()
        status = 1
    return int(status)


def _drop_output() -> None:
    """Has what is in stdout's buffer go nowhere at exit, as it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
