# SPDX-License-Identifier: GPL-2.0-or-later
"""``vhostvmbus vm``: a Linux guest whose disk is served over VMBus.

Only a command's own output goes to stdout; everything else is said on stderr.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import vhostvmbus
from vhostvmbus.cli.printer import Printer
from vhostvmbus.cli.words import in_words, say
from vhostvmbus.devices.net.link import LinkDown
from vhostvmbus.devices.net.link.passt import Passt
from vhostvmbus.devices.net.link.spec import SpecError, parse
from vhostvmbus.devices.scsi.disk import parse_disk
from vhostvmbus.vm import accel, images, nested, terminal
from vhostvmbus.vm.errors import GuestTimeout, SetupError, VmError
from vhostvmbus.vm.machine import CARD, Machine, MachinePlan
from vhostvmbus.vm.modules_disk import find_modules_disk
from vhostvmbus.vm.streams import Sink

HELP = "start a guest whose disks Python serves over VMBus"
EPILOG = f"""\
Without --cmd you get a root shell on the guest's serial console. {terminal.HELP}.

exit status: the command's own; 124 when the time was up; 125 when the machine failed, or the
command's output could not be written
"""
PACKAGE = Path(vhostvmbus.__file__).parent
TIMED_OUT = 124
FAILED = 125


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds ``vm`` to the command line."""
    parser = commands.add_parser(
        "vm",
        help=HELP,
        description=HELP,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cmd", metavar="SCRIPT", help="run this as root in the guest, then power off")
    add("--timeout", type=_seconds, default=300.0, metavar="SECONDS",
        help="for --cmd the time for all of it, else the time to boot (default: 300)")  # fmt: skip
    add("--kernel", default="6.1", metavar="5.10|6.1|6.12|VMLINUZ", help="default: 6.1")
    add("--modules", metavar="FOLDER", help="lib/modules/<version> of a VMLINUZ")
    add("--append", default="", metavar="WORDS", help="further kernel command line")
    add("--smp", type=_processors, default=2, metavar="N", help="processors (default: 2)")
    add("--mem", default="1G", metavar="SIZE", help="guest memory (default: 1G)")
    add("--accel", choices=("auto", "tcg", "kvm", "nested"), default="auto",
        help="auto: KVM if it can do Hyper-V, else tcg; nested: KVM in a TCG machine")  # fmt: skip
    add("--disk", action="append", default=[], metavar="FILE[:SIZE]", dest="disks",
        help="a further disk, made with SIZE if absent; repeatable")  # fmt: skip
    add("--net", action="append", default=[], metavar="LINK", dest="networks",
        help="a network card: user (the default), tap, tap:NAME, bridge:NAME, netns:NAME; "
        "none for none; see vhostvmbus serve net --help; repeatable")  # fmt: skip
    add("--device", action="append", default=[], metavar="PATH.py:CLASS", dest="devices",
        help="a further VMBus device of your own; what it writes is shown; repeatable")  # fmt: skip
    add("--keep-no-output", action="store_true", help=argparse.SUPPRESS)
    add("--root", metavar="IMAGE", help="use this root image, and write to it")
    add("--no-root", action="store_true", help="no root disk: stay in the initramfs")
    add("--initramfs", metavar="FILE", help="use this initramfs")
    add("--qemu", metavar="PROGRAM", help="a QEMU built with our device")
    add("--log", metavar="FILE", help="write the console's output here too")
    add("--qemu-arg", action="append", default=[], metavar="WORD", dest="extra",
        help="a further word for QEMU's command line; repeatable")  # fmt: skip
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("a time is more than 0 seconds")
    return value


def _processors(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError("1 to 64 processors")
    return value


def run(options: argparse.Namespace) -> int:
    """Starts the machine and does what was asked."""
    try:
        return _run(make_plan(options), options)
    except GuestTimeout as error:
        say(f"vhostvmbus vm: {error}")
        return TIMED_OUT
    except VmError as error:
        say(f"vhostvmbus vm: {error}")
        return FAILED
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk, a folder that may not be written to ...
        say(f"vhostvmbus vm: {in_words(error)}")
        return FAILED


def make_plan(options: argparse.Namespace) -> MachinePlan:
    """Returns the machine that the options ask for; fetches and builds what is missing."""
    if options.accel == "nested":
        name = "kvm"
        say("accelerator: KVM, in a machine that QEMU translates (as asked)")
    else:
        chosen = accel.choose(options.accel)
        name = chosen.name
        say(f"accelerator: {name} ({chosen.reason})")
    qemu = images.qemu_binary(options.qemu)
    modules_disk = None
    if options.initramfs:
        kernel, initramfs = Path(options.kernel).resolve(), Path(options.initramfs).resolve()
    else:
        found = images.find_kernel(options.kernel, options.modules)
        kernel, initramfs = found.image, images.find_initramfs(found)
        if not options.no_root and options.accel != "nested":
            modules_disk = find_modules_disk(found.modules, found.extras, say)
    root = persistent = None
    if options.root:
        persistent = Path(options.root).resolve()
    elif not options.no_root:
        root = images.root_template()
    append = options.append
    if options.cmd is None:
        append = f"{terminal.terminal_words()} {append}"
    return MachinePlan(
        qemu=qemu,
        kernel=kernel,
        initramfs=initramfs,
        accel=name,
        root=root,
        persistent_root=persistent,
        disks=options.disks,
        modules_disk=modules_disk,
        networks=networks(options),
        backends=[[name] for name in options.devices],
        append=append,
        smp=options.smp,
        memory=options.mem,
        shell=options.cmd is None,
        extra=options.extra,
        console_log=Path(options.log) if options.log else None,
        keep_output=not options.keep_no_output,
    )


def networks(options: argparse.Namespace) -> list[str]:
    """Returns the links of the cards; what was not asked for need not be possible."""
    asked: list[str] = options.networks
    try:
        wanted = [link for link in asked if parse(link).kind != "none"]
    except SpecError as error:
        raise SetupError(str(error)) from error
    if options.accel == "nested":
        if wanted:
            raise SetupError("a machine in a machine (nested) has no network; use NET=none")
        return []
    if not asked:
        try:
            Passt(parse("user")).close()
        except LinkDown as error:
            say(f"network: none, since it cannot be had here: {error}")
        else:
            return ["user"]
    return wanted


def _say_troubles(machine: Machine) -> None:
    """Says what the network cards' back ends warn of: the guest works, but not its network."""
    for backend in machine.backends:
        if backend.name.startswith(CARD) and (words := backend.child.last_words()):
            say(f"the network card {backend.name} says:\n{words}")


def _run(plan: MachinePlan, options: argparse.Namespace) -> int:
    started = time.monotonic()
    deadline = started + options.timeout
    script = options.cmd
    if options.accel == "nested":
        # The inner machine gives up first, so that its own message is the one to be seen.
        patience = max(1.0, options.timeout * 0.8)
        inner = nested.Inner(options.cmd, patience, options.devices, PACKAGE)
        script = nested.script(plan, inner)
        plan = nested.wrap(replace(plan, disks=_made(plan.disks)), inner)
    printer = Printer()
    machine = Machine(replace(plan, show=printer.show))
    say(f"booting; console log: {machine.console_log}")
    with _told_at_the_end(machine, printer), machine:
        machine.wait_ready(options.timeout)
        say(f"the guest is up after {time.monotonic() - started:.1f} s")
        _say_troubles(machine)
        if options.cmd is None:
            say(terminal.HELP)
            if script is not None:
                machine.submit(script)
            terminal.attach(machine)
            return 0
        left = max(1.0, deadline - time.monotonic())
        result = machine.run(script, left, stdout=_sink(1), stderr=_sink(2))
        machine.poweroff()
        for port, error in result.lost.items():
            say(f"vhostvmbus vm: the command's {port} could not be written: {in_words(error)}")
        return FAILED if result.lost else result.status


@contextlib.contextmanager
def _told_at_the_end(machine: Machine, printer: Printer) -> Iterator[None]:
    """Tells the last lines of the devices, whatever happened, then where all their lines are."""
    try:
        yield
    finally:
        printer.close()
        if error := machine.streams.log_error:
            say(f"the console log is not whole: {in_words(error)}")
        for output in machine.outputs:
            if output.fate:
                say(output.fate)


def _made(disks: Sequence[Path | str]) -> list[str]:
    """Returns the disks' files, made if need be, for a machine whose disks QEMU serves."""
    try:
        specs = [parse_disk(str(disk)) for disk in disks]
        for spec in specs:
            spec.open().close()
    except (ValueError, OSError) as error:
        raise SetupError(in_words(error)) from error
    return [spec.path for spec in specs]


def _sink(fd: int) -> Sink:
    def write(data: bytes) -> None:
        while data:
            with contextlib.suppress(InterruptedError):
                data = data[os.write(fd, data) :]

    return write
