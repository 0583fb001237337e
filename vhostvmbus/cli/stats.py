# SPDX-License-Identifier: GPL-2.0-or-later
"""``vhostvmbus stats``: the counters of a device that is being served, as text or JSON."""

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any

from vhostvmbus.cli.words import in_words, say
from vhostvmbus.observe.statistics import read_statistics, statistics_path

HELP = "show the counters of a device that is being served"
EPILOG = "The counters are explained in docs/statistics.md."
_INDENT = 22


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``stats`` to the command line."""
    parser = commands.add_parser("stats", help=HELP, description=HELP, epilog=EPILOG)
    parser.add_argument("socket", metavar="SOCKET", help="the device's socket")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.add_argument(
        "--watch", type=_interval, metavar="S", help="again every S seconds, until interrupted"
    )
    parser.set_defaults(run=run)


def _interval(text: str) -> float:
    value = float(text)
    if not 0.01 <= value <= 1e6:
        raise argparse.ArgumentTypeError("between 0.01 and 1000000 seconds")
    return value


def run(options: argparse.Namespace) -> int:
    """Prints the counters; returns 1 if nobody serves them."""
    while True:
        try:
            found = read_statistics(options.socket)
        except (OSError, ValueError) as error:
            where = statistics_path(options.socket)
            say(f"vhostvmbus stats: {where}: {in_words(error)}")
            return 1
        print(
            json.dumps(found, indent=None if options.watch else 2)
            if options.json
            else as_text(found),
            flush=True,
        )
        if options.watch is None:
            return 0
        time.sleep(options.watch)


def as_text(found: Mapping[str, Any]) -> str:
    """Returns the document for people: one line for what belongs together, no errors of zero."""
    lines = [
        f"{found['name']}, class {found['class_id']}",
        _line(
            "guest memory",
            f"{_bytes(found['memory_bytes'])} in {found['memory_regions']} "
            f"regions; {found['gpadls']} GPADLs, {_bytes(found['gpadl_bytes'])}",
        ),
        *_counters(found["totals"]),
    ]
    if found.get("suspended"):
        lines.insert(1, _line("stands still", "its machine is stopped"))
    if rights := found.get("sandbox"):
        kept = ", ".join(rights["capabilities"]) or "none"
        refused = rights["refused_system_calls"]
        lines.append(_line("rights", f"capabilities {kept}; {refused} system calls refused"))
    for name, value in found["device"].items():
        lines.append(_line(name, json.dumps(value)))
    for channel in found["channels"]:
        state = channel["state"] + (", paused" if channel["paused"] else "")
        lines += ["", f"channel {channel['index']}: {state}"]
        if channel["error"]:
            lines.append(_line("stopped by", channel["error"]))
        lines.append(
            _line(
                "outstanding",
                f"{channel['outstanding']} of {channel['quota']}, "
                f"{channel['queued']} wait for space",
            )
        )
        lines += _counters(channel)
        lines += _rings(channel["ring"])
    return "\n".join(lines)


def _counters(c: Mapping[str, Any]) -> list[str]:
    batch = c["packets_received"] / c["batches"] if c["batches"] else 0.0
    errors = ", ".join(f"{n} {name}" for name, n in sorted(c["errors"].items())) or "none"
    return [
        _line(
            "received",
            f"{c['packets_received']} packets, {_bytes(c['bytes_received'])}; "
            f"external {_bytes(c['external_bytes'])}",
        ),
        _line(
            "completed",
            f"{c['completions_sent']} sent, {c['completions_received']} received, "
            f"{c['dropped']} dropped",
        ),
        _line("sent", f"{c['packets_sent']} packets, {_bytes(c['bytes_sent'])}"),
        _line("batches", f"{c['batches']}, {batch:.1f} packets each, {c['max_batch']} at most"),
        _line(
            "signals",
            f"{c['signals_sent']} sent, {c['signals_suppressed']} suppressed, "
            f"{c['wakeups']} wake-ups, {c['rests']} rests",
        ),
        _line("limits met", f"ring full {c['ring_full']}, quota {c['quota_reached']}"),
        _line("errors", errors),
    ]


def _rings(ring: Mapping[str, Any] | None) -> list[str]:
    if ring is None:
        return []
    used = ring["tx_size"] - ring["tx_free"]
    return [
        _line("ring from the guest", f"{ring['rx_available']} of {ring['rx_size']} bytes used"),
        _line("ring to the guest", f"{used} of {ring['tx_size']} bytes used"),
    ]


def _line(name: str, text: str) -> str:
    return f"  {name:<{_INDENT}}{text}"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
