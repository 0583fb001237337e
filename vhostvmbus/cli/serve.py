# SPDX-License-Identifier: GPL-2.0-or-later
"""``vhostvmbus serve``: one device on one socket.

The devices are found by themselves: a package ``vhostvmbus.devices.NAME`` with a module
``options`` is the device NAME. A device of the user's own is ``path.py:Class``.
"""

import argparse
import contextlib
import grp
import importlib
import importlib.util
import io
import logging
import os
import pkgutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

from vhostvmbus import devices
from vhostvmbus.cli import sandbox
from vhostvmbus.cli.activation import ActivationError, handed_over
from vhostvmbus.cli.log import set_up
from vhostvmbus.cli.words import in_words, say
from vhostvmbus.device import Device, DeviceHost
from vhostvmbus.device.loading import LoadError, load_device
from vhostvmbus.observe.statistics import serving_statistics
from vhostvmbus.vhost_user.errors import NotASocket, SocketInUse
from vhostvmbus.vhost_user.server import Server
from vhostvmbus.vhost_user.sockets import OWNER_ONLY, bind_listener

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
        parser.set_defaults(
            make_device=options.make_device,
            sandbox="on",
            capabilities=getattr(options, "CAPABILITIES", ()),
            system_calls=getattr(options, "SYSTEM_CALLS", ()),
        )
    elif ":" in name:
        parser.add_argument("--instance-id", type=UUID, metavar="UUID",
            help="of the VMBus device (default: the class's, or the socket path's)")  # fmt: skip
        # Nobody knows what a device of the user's own does with the rights that it has.
        parser.set_defaults(
            make_device=lambda options: _load(name, options.instance_id),
            sandbox="off",
            capabilities=(),
            system_calls=(),
        )
    else:
        known = ", ".join(device_names())
        raise ServeError(f"no device {name}; there are {known}, and path.py:Class")
    _add_common(parser)
    return parser


def _load(name: str, instance_id: UUID | None) -> Device:
    device = load_device(name)
    if instance_id is not None:
        device.instance_id = instance_id
    return device


def device_names() -> list[str]:
    """Returns the names of the devices that come with the package."""
    names = []
    for module in pkgutil.iter_modules(devices.__path__):
        if importlib.util.find_spec(f"vhostvmbus.devices.{module.name}.options"):
            names.append(module.name)
    return names


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--socket", metavar="PATH",
        help="the UNIX socket; not for one that systemd hands over")  # fmt: skip
    parser.add_argument("--socket-mode", type=_mode, metavar="MODE",
        help="the socket's permissions (0600); who may write may connect")  # fmt: skip
    parser.add_argument("--socket-group", type=_group, metavar="GROUP",
        help="the socket's group, a name or a number")  # fmt: skip
    parser.add_argument(
        "--connect",
        action="store_true",
        help="connect to the socket, at which QEMU listens (server=on), again and again",
    )
    parser.add_argument(
        "--no-stats", action="store_true", help="do not serve statistics at PATH.stats"
    )
    parser.add_argument("--sandbox", choices=("on", "off"),
        help="give up what rights the device does without once all is open; default: on, but off "
        "for a device of your own")  # fmt: skip
    parser.add_argument("--verbose", "-v", action="store_true", help="log what happens")
    parser.add_argument("--instance-name", help=argparse.SUPPRESS)
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)


def _mode(text: str) -> int:
    value = int(text, 8)
    if not 0 <= value <= 0o777:
        raise argparse.ArgumentTypeError("three octal digits, 660 for instance")
    return value


def _group(text: str) -> int:
    if text.isdigit():
        return int(text)
    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no group {text}") from None


def _parse(options: argparse.Namespace) -> tuple[argparse.Namespace, socket.socket | None]:
    """Returns what was asked for, and the socket that was handed over, if there is one."""
    parser = _device_parser(options.device)
    options = parser.parse_args(options.arguments)
    handed = handed_over()
    access = (options.socket_mode, options.socket_group)
    if handed is None:
        if options.socket is None:
            parser.error("the following arguments are required: --socket")
        if options.connect and access != (None, None):
            parser.error("with --connect the socket is QEMU's, and so are its mode and group")
        return options, None
    if options.socket is not None or options.connect or access != (None, None):
        parser.error("the socket is handed over: leave out --socket and what belongs to it")
    options.socket = handed.getsockname()
    return options, handed


def run(options: argparse.Namespace) -> int:
    """Serves until interrupted."""
    try:
        options, handed = _parse(options)
    except (ServeError, ActivationError) as error:
        say(f"vhostvmbus serve: {error}")
        return 2
    set_up(options.verbose)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Whoever reads a device's output gets each line when it is written, and whole.
        sys.stdout.reconfigure(line_buffering=True)
    try:
        make: Callable[[argparse.Namespace], Device] = options.make_device
        device = make(options)
    except (LoadError, ValueError, OSError) as error:
        say(f"vhostvmbus serve: {in_words(error)}")
        return 1
    if device.instance_id is None:
        # The socket's path: no other device of a guest has it, and it is the same at each start.
        name = options.instance_name or os.path.abspath(options.socket)
        device.instance_id = uuid5(device.class_id, name)
    host = DeviceHost(device)
    server = Server(
        host, options.socket, listen=not options.connect, listener=_listener(options, handed)
    )
    in_force: dict[str, Any] = {}
    try:
        with _statistics(options, host, in_force):
            server.run(lambda: _begin(options, in_force))
    except (SocketInUse, NotASocket, OSError) as error:
        say(f"vhostvmbus serve: {in_words(error)}")
        return 1
    finally:
        host.close()
    return 0


def _listener(
    options: argparse.Namespace, handed: socket.socket | None
) -> contextlib.AbstractContextManager[socket.socket]:
    """Returns what gives the socket to listen at, made when it is entered."""
    if handed is not None:
        return handed
    mode = OWNER_ONLY if options.socket_mode is None else options.socket_mode
    return bind_listener(Path(options.socket), mode, options.socket_group)


@contextlib.contextmanager
def _statistics(
    options: argparse.Namespace, host: DeviceHost, in_force: dict[str, Any]
) -> Iterator[None]:
    """Serves statistics, with the sandbox that is ``in_force``, beside the device.

    What keeps them from being served keeps nothing else.
    """
    with contextlib.ExitStack() as stack:
        if not options.no_stats:
            try:
                stack.enter_context(
                    serving_statistics(
                        options.socket, lambda: {**host.stats(), "sandbox": dict(in_force)}
                    )
                )
            except (SocketInUse, NotASocket, OSError) as error:
                log.warning("no statistics: %s", in_words(error))
        yield


def _begin(options: argparse.Namespace, in_force: dict[str, Any]) -> None:
    """Gives up rights, as all is open now, and tells that front ends may come."""
    if options.sandbox == "on":
        in_force.update(sandbox.enter(options.capabilities, options.system_calls))
    if options.ready_fd is not None:
        os.write(options.ready_fd, b"\n")
        os.close(options.ready_fd)
    elif not options.connect:
        say(f"listening on {options.socket}; Ctrl-C ends it")
