# SPDX-License-Identifier: GPL-2.0-or-later
"""``vhostvmbus serve``: one device on one socket.

The devices are found by themselves: a package ``vhostvmbus.devices.NAME`` with a module
``options`` is the device NAME. A device of the user's own is ``path.py:Class``.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from vhostvmbus import devices
from vhostvmbus.cli.log import set_up
from vhostvmbus.device import Device, DeviceHost
from vhostvmbus.device.loading import LoadError, load_device
from vhostvmbus.observe.statistics import serving_statistics
from vhostvmbus.vhost_user.errors import NotASocket, SocketInUse
from vhostvmbus.vhost_user.server import Server

log = logging.getLogger(__name__)

HELP = "serve one device on a socket, for a QEMU that you start yourself"
EPILOG = """\
a device of your own:
  vhostvmbus serve path.py:Class --socket PATH

QEMU's side of the socket:
  -device vmbus-bridge -chardev socket,id=c0,path=PATH,reconnect-ms=250
  -device vhost-user-vmbus,chardev=c0
"""


class ServeError(Exception):
    """The device cannot be served; the message is for the user."""


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``serve`` to the command line."""
    parser = commands.add_parser(
        "serve",
        help=HELP,
        description=HELP,
        usage="vhostvmbus serve DEVICE [ARGUMENT...] --socket PATH",
        epilog=_device_list() + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("device", metavar="DEVICE", help="a device's name, or path.py:Class")
    # What comes behind the device's name is for the device's own parser.
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def _device_list() -> str:
    lines = ["devices (vhostvmbus serve DEVICE --help says more):"]
    lines += [f"  {name:<12}{_options(name).HELP}" for name in device_names()]
    return "\n".join(lines) + "\n\n"


def _options(name: str) -> Any:
    return importlib.import_module(f"vhostvmbus.devices.{name}.options")


def _device_parser(name: str) -> argparse.ArgumentParser:
    """Returns the parser for the arguments of the device ``name``."""
    parser = argparse.ArgumentParser(prog=f"vhostvmbus serve {name}")
    if name in device_names():
        options = _options(name)
        parser.description = options.HELP
        options.add_arguments(parser)
        parser.set_defaults(make_device=options.make_device)
    elif ":" in name:
        parser.set_defaults(make_device=lambda options: load_device(name))
    else:
        known = ", ".join(device_names())
        raise ServeError(f"no device {name}; there are {known}, and path.py:Class")
    _add_common(parser)
    return parser


def device_names() -> list[str]:
    """Returns the names of the devices that come with the package."""
    names = []
    for module in pkgutil.iter_modules(devices.__path__):
        if importlib.util.find_spec(f"vhostvmbus.devices.{module.name}.options"):
            names.append(module.name)
    return names


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", required=True, metavar="PATH", help="the UNIX socket")
    parser.add_argument(
        "--connect",
        action="store_true",
        help="connect to the socket, at which QEMU listens (server=on), again and again",
    )
    parser.add_argument(
        "--no-stats", action="store_true", help="do not serve statistics at PATH.stats"
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="log what happens")
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Serves until interrupted."""
    try:
        options = _device_parser(options.device).parse_args(options.arguments)
    except ServeError as error:
        print(f"vhostvmbus serve: {error}", file=sys.stderr)
        return 2
    set_up(options.verbose)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Whoever reads a device's output gets each line when it is written, and whole.
        sys.stdout.reconfigure(line_buffering=True)
    try:
        make: Callable[[argparse.Namespace], Device] = options.make_device
        device = make(options)
    except (LoadError, ValueError, OSError) as error:
        print(f"vhostvmbus serve: {error}", file=sys.stderr)
        return 1
    host = DeviceHost(device)
    server = Server(host, options.socket, listen=not options.connect)
    try:
        with _statistics(options, host):
            server.run(lambda: _tell(options))
    except (SocketInUse, NotASocket, OSError) as error:
        print(f"vhostvmbus serve: {error}", file=sys.stderr)
        return 1
    finally:
        host.close()
    return 0


@contextlib.contextmanager
def _statistics(options: argparse.Namespace, host: DeviceHost) -> Iterator[None]:
    """Serves statistics beside the device; what keeps them from being served keeps nothing else."""
    with contextlib.ExitStack() as stack:
        if not options.no_stats:
            try:
                stack.enter_context(serving_statistics(options.socket, host.stats))
            except (SocketInUse, NotASocket, OSError) as error:
                log.warning("no statistics: %s", error)
        yield


def _tell(options: argparse.Namespace) -> None:
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"\n")
        os.close(options.ready_fd)
    elif not options.connect:
        print(f"listening on {options.socket}; Ctrl-C ends it", file=sys.stderr)
