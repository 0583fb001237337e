# SPDX-License-Identifier: GPL-2.0-or-later
"""``vhostvmbus try``: a device of one's own against the software guest, without a machine.

The device's file may have a function ``check(exchange) -> bool``, which is given each
:class:`~vhostvmbus.guest.trial.Exchange` and says whether the device did what it should.
"""

import argparse
import logging
import sys
from collections.abc import Callable

from vhostvmbus.cli.words import say
from vhostvmbus.device import Device
from vhostvmbus.device.loading import LoadError, load_device
from vhostvmbus.guest import Exchange, GuestRam, GuestSideError, SoftwareGuest, Trial, try_channel
from vhostvmbus.vhost_user.errors import RequestRefused
from vhostvmbus.wire.errors import VmbusError
from vhostvmbus.wire.vmbus import PAGE_SIZE

HELP = "send packets to a device of your own, from a guest in software"
EPILOG = """\
example:
  vhostvmbus try examples/pfn_digest.py:PfnDigest --pages 16

If the file has a function check(exchange) -> bool, it judges each packet's outcome
(vhostvmbus.guest.Exchange). The exit status is 0 if every packet was completed, no page
but its own was touched, and check(), if there is one, agreed.
"""
_RING_PAGES = 257
"""Pages of each ring, its header page included: the longest packet fits."""
_SPARE = 8 << 20
"""Bytes of guest memory besides the packets' pages."""
Check = Callable[[Exchange], bool]


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``try`` to the command line."""
    parser = commands.add_parser(
        "try",
        help=HELP,
        description=HELP,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("device", metavar="PATH.py:CLASS", help="the device")
    add("--count", type=_positive, default=4, metavar="N", help="packets, all sent at once (4)")
    add("--pages", type=int, default=4, metavar="N",
        help="pages that each packet describes; 0 sends in-band packets (4)")  # fmt: skip
    add("--payload", default="packet {n}", metavar="TEXT",
        help="the in-band bytes; {n} is the packet's number (packet {n})")  # fmt: skip
    add("--timeout", type=float, default=10.0, metavar="S",
        help="seconds to wait for a completion (10)")  # fmt: skip
    add("--verbose", "-v", action="store_true", help="log what happens")
    parser.set_defaults(run=run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def run(options: argparse.Namespace) -> int:
    """Tries the device; returns 0 if all went well, 1 if not, 2 if it could not be tried."""
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        device = load_device(options.device)
        check: Check | None = getattr(sys.modules[type(device).__module__], "check", None)
        with SoftwareGuest.for_device(device, ram=_ram(options)) as guest:
            trial, errors = _try(guest, options)
    except RequestRefused as error:
        say(f"vhostvmbus try: the device refused: {error}")
        return 1
    except (LoadError, GuestSideError, VmbusError, ValueError) as error:
        say(f"vhostvmbus try: {error}")
        return 2
    return _report(device, trial, errors, check, options)


def _ram(options: argparse.Namespace) -> GuestRam:
    if options.pages < 0:
        raise ValueError("--pages is a number of pages")
    wanted = options.count * (options.pages + 2) * PAGE_SIZE
    half = (wanted // 2 + _SPARE) & -PAGE_SIZE
    if half >= 1 << 32:
        raise ValueError("that is more memory than the software guest has")
    return GuestRam([(0, half), (0x1_0000_0000, half)])


def _try(guest: SoftwareGuest, options: argparse.Namespace) -> tuple[Trial, dict[str, int]]:
    try:
        with guest.open_channel(ring_pages=(_RING_PAGES, _RING_PAGES)) as channel:
            trial = try_channel(
                channel,
                guest.ram,
                payload=lambda n: options.payload.replace("{n}", str(n)).encode(),
                count=options.count,
                pages=options.pages,
                timeout=options.timeout,
            )
            assert guest.host is not None
            return trial, guest.host.stats()["channels"][0]["errors"]
    finally:
        guest.ram.close()


def _report(
    device: Device,
    trial: Trial,
    errors: dict[str, int],
    check: Check | None,
    options: argparse.Namespace,
) -> int:
    good = True
    print(f"{type(device).__name__}, class {device.class_id}")
    for number, payload in enumerate(trial.from_host):
        print(f"  the host sent #{number}: {_shown(payload)}")
    for exchange in trial.exchanges:
        verdict = _verdict(exchange, check)
        good &= verdict in ("verified", "completed")
        print(f"  #{exchange.number}: {_sent(exchange)} -> {_outcome(exchange)}: {verdict}")
    done = sorted((e for e in trial.exchanges if e.place >= 0), key=lambda e: e.place)
    order = " ".join(str(exchange.number) for exchange in done[:20])
    more = " ..." if len(done) > 20 else ""
    print(f"{len(done)} of {len(trial.exchanges)} packets completed, in the order {order}{more}")
    if errors:
        print("errors of the channel: " + ", ".join(f"{n} x {e}" for e, n in errors.items()))
    if check is None:
        print(f"{options.device.rpartition(':')[0]} has no check(exchange), so nobody judged")
    return 0 if good and not errors else 1


def _verdict(exchange: Exchange, check: Check | None) -> str:
    if exchange.failure is not None:
        return str(exchange.failure)
    if exchange.strayed:
        return "WRONG: a page beside the packet's own was touched"
    if check is None:
        return "completed"
    return "verified" if check(exchange) else "WRONG: check() does not agree"


def _sent(exchange: Exchange) -> str:
    pages = len(exchange.before) // PAGE_SIZE
    return _shown(exchange.payload) + (f" + {pages} pages" if pages else "")


def _outcome(exchange: Exchange) -> str:
    if exchange.failure is not None:
        return "nothing"
    text = f"{_shown(exchange.completion)} after {exchange.seconds * 1000:.2f} ms"
    if exchange.before:
        text += ", pages " + ("unchanged" if exchange.after == exchange.before else "changed")
    return text


def _shown(data: bytes) -> str:
    """Returns text as text, without the padding; other bytes in hexadecimal; long ones cut."""
    text = data.rstrip(b"\0")
    if text.isascii() and text.decode("ascii").isprintable():
        shown = repr(text.decode("ascii"))
    else:
        shown = data.hex()
    return shown if len(shown) <= 40 else f"{shown[:36]}... ({len(data)} bytes)"
