# SPDX-License-Identifier: GPL-2.0-or-later
"""One virtual machine from start to end: back ends, QEMU, the guest's agent.

Use as a context manager; leaving it ends every process and removes every file of the run,
whatever happened. Start a machine from a thread that lives as long as the machine shall (see
``process``).
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from uuid import NAMESPACE_URL, uuid5

from vhostvmbus.vm import images
from vhostvmbus.vm.backend import SERVE, BackEndProcess
from vhostvmbus.vm.cache import new_log
from vhostvmbus.vm.device_output import DeviceOutput, titles
from vhostvmbus.vm.errors import GuestFailure, GuestTimeout, SetupError, VmError
from vhostvmbus.vm.modules_disk import SERIAL as MODULES_SERIAL
from vhostvmbus.vm.ports import Control
from vhostvmbus.vm.process import Child, RunFolder
from vhostvmbus.vm.qemu_args import Hardware, command_line
from vhostvmbus.vm.qmp import Monitor
from vhostvmbus.vm.streams import Sink, Streams, discard

POWEROFF_PATIENCE = 60.0
LOOK_INTERVAL = 0.2
REPORT_PATIENCE = 1.0
"""Seconds that a kernel gets to finish its report of what went wrong."""
ROOT_SERIAL = "vhostvmbus-root"
"""The serial number by which the guest knows its root disk, however Linux names it."""

CARD = "net"
"""The beginning of the names of the network cards' back ends."""


def with_address(link: str) -> str:
    """Returns a link with a MAC address, one of its own if it has none.

    The card is to keep its address when its back end is started again. 52:54:00 is what QEMU gives
    too, locally administered.
    """
    if ",mac=" in link:
        return link
    return f"{link},mac=52:54:00:{os.urandom(3).hex(':')}"


@dataclass(frozen=True)
class MachinePlan:
    """A machine to be made. Paths are absolute; see the command's help for the rest.

    ``root`` is an image to copy for the run, ``persistent_root`` one to use as it is; with
    neither the guest stays in its initramfs. ``networks`` has a link for each network card, as
    ``vhostvmbus serve net --link`` takes it. ``backends`` are further ``vhostvmbus serve`` argument
    lists, each one more VMBus device; ``show`` gets each line that one of them writes, behind its
    name, and must not block.
    """

    qemu: Path
    kernel: Path
    initramfs: Path
    accel: str = "tcg"
    root: Path | None = None
    persistent_root: Path | None = None
    disks: Sequence[Path | str] = ()
    modules_disk: Path | None = None
    """An image with all of the kernel's modules, to be the last disk of a machine with a root."""
    networks: Sequence[str] = ()
    backends: Sequence[Sequence[str]] = ()
    show: Callable[[str, str], None] | None = None
    keep_output: bool = True
    """Set to leave files with what those devices write behind; only with ``show``."""
    append: str = ""
    smp: int = 2
    memory: str = "1G"
    machine: str = "pc"
    cpu: str | None = None
    bus: str = "vmbus"
    """The bus of the root and the disks: "vmbus", served by us, or "virtio", QEMU's own."""
    shell: bool = False
    extra: Sequence[str] = ()
    files: Sequence[bytes] = ()
    """Further cpio archives to be unpacked over the initramfs."""
    console_log: Path | None = None
    serve: Sequence[str] = SERVE
    """The program that serves a device; tests put one of their own here."""


@dataclass(frozen=True)
class Result:
    """The outcome of a command in the guest, and what it wrote."""

    status: int
    stdout: bytes
    stderr: bytes
    lost: Mapping[str, OSError] = field(default_factory=dict)
    """The streams, ``stdout`` and ``stderr``, of which a sink did not take all, and why."""


class Machine:
    """A machine made to a plan; nothing runs before :meth:`start`."""

    def __init__(self, plan: MachinePlan) -> None:
        self.plan = plan
        self.backends: list[BackEndProcess] = []
        self.backends_may_end = False
        """True while a test kills back ends on purpose."""
        self.outputs: list[DeviceOutput] = []
        """The output of the devices of the user's own, if it is shown."""
        self._folder = RunFolder()
        try:
            self._log_path = plan.console_log or new_log("console", self._folder.path.name)
            self._log = open(self._log_path, "wb", buffering=0)  # noqa: SIM115 - close()
        except BaseException:
            self._folder.close()
            raise
        self._streams = Streams(self._log)
        self._qemu: Child | None = None
        self._monitor: Monitor | None = None
        self._requests = 0
        self.failed = False

    def __enter__(self) -> "Machine":
        try:
            self.start()
        except BaseException:
            self.failed = True
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and issubclass(kind, VmError):
            self.failed = True
        self.close()

    @property
    def console_log(self) -> Path:
        """The file that the console's bytes go to."""
        return self._log_path

    @property
    def folder(self) -> Path:
        """The run's folder: disks, sockets, logs; removed at the end."""
        return self._folder.path

    @property
    def root_image(self) -> Path:
        """The image that the guest's root file system is on."""
        return self.plan.persistent_root or self._folder.path / "root.img"

    @property
    def monitor(self) -> Monitor:
        """QEMU's monitor."""
        assert self._monitor is not None
        return self._monitor

    @property
    def qemu(self) -> Child:
        """QEMU's process."""
        assert self._qemu is not None
        return self._qemu

    @property
    def streams(self) -> Streams:
        """The guest's serial ports."""
        return self._streams

    def start(self) -> None:
        """Starts the back ends and QEMU. Raises SetupError if either does not come up."""
        plan = self.plan
        if plan.root is not None:
            images.copy_sparse(plan.root, self.root_image)
        disks = [str(path) for path in plan.disks]
        if plan.root or plan.persistent_root:
            serial = f",serial={ROOT_SERIAL}" if plan.bus == "vmbus" else ""
            disks.insert(0, f"{self.root_image}{serial}")
        if self._has_modules_disk:
            disks.append(f"{plan.modules_disk},ro,serial={MODULES_SERIAL}")
        if disks and plan.bus == "vmbus":
            self._add_backend("scsi", ["scsi", *disks])
            disks = []
        for index, link in enumerate(plan.networks):
            name = f"{CARD}{index}"
            card = ["net", "--link", with_address(link)]
            if ",mac=" not in link:  # the address is another one each time; the instance is not
                card += ["--instance-id", str(uuid5(NAMESPACE_URL, f"vhostvmbus:{name}"))]
            self._add_backend(name, card)
        for index, title in enumerate(titles([words[0] for words in plan.backends])):
            name = f"device{index}"
            device = [*plan.backends[index], "--instance-name", name]
            self._add_backend(name, device, self._follow(title))
        ours, theirs = socket.socketpair()
        hardware = Hardware(
            qemu=plan.qemu,
            firmware=images.firmware_folders(),
            accel=plan.accel,
            kernel=plan.kernel,
            initramfs=self._initramfs(),
            append=self._append(),
            port_fds=self._streams.guest_fds,
            qmp_fd=theirs.fileno(),
            sockets=[backend.socket for backend in self.backends],
            smp=plan.smp,
            memory=plan.memory,
            machine=plan.machine,
            cpu=plan.cpu,
            vmbus=plan.bus == "vmbus",
            virtio_disks=disks,
            extra=plan.extra,
        )
        fds = [*hardware.port_fds.values(), theirs.fileno()]
        env = dict(os.environ, QEMU_MODULE_DIR="/nonexistent")
        log = self.folder / "qemu.log"
        self._qemu = Child("QEMU", command_line(hardware), log, pass_fds=fds, env=env)
        theirs.close()
        self._streams.start()
        try:
            self._monitor = Monitor(ours)
        except VmError as error:
            ours.close()
            self._qemu.terminate(2.0)
            words = self._qemu.last_words()
            raise SetupError(f"QEMU did not start: {error}\n{words}") from error

    @property
    def _has_modules_disk(self) -> bool:
        plan = self.plan
        has_root = plan.root or plan.persistent_root
        return bool(plan.modules_disk and has_root and plan.bus == "vmbus")

    def _add_backend(
        self, name: str, words: Sequence[str], output: DeviceOutput | None = None
    ) -> None:
        back_end = BackEndProcess(name, words, self.folder, self.plan.serve, output)
        self.backends.append(back_end)

    def _follow(self, title: str) -> DeviceOutput | None:
        """Returns the way for what a device of the user's own writes, if it is shown."""
        if self.plan.show is None:
            return None
        path = new_log("device", f"{self.folder.name}-{title}") if self.plan.keep_output else None
        self.outputs.append(DeviceOutput(title, path, self.plan.show))
        return self.outputs[-1]

    def _initramfs(self) -> Path:
        if not self.plan.files:
            return self.plan.initramfs
        path = self.folder / "initramfs"
        path.write_bytes(self.plan.initramfs.read_bytes() + b"".join(self.plan.files))
        return path

    def _append(self) -> str:
        plan = self.plan
        words = ["console=ttyS0", "net.ifnames=0"]
        if " root=" not in f" {plan.append}":
            if not (plan.root or plan.persistent_root):
                words.append("root=none")
            elif plan.bus == "vmbus":
                words.append(f"root=serial:{ROOT_SERIAL}")
        if self._has_modules_disk:
            words.append(f"vhostvmbus.modules-disk={MODULES_SERIAL}")
        words.append(f"vhostvmbus.shell={int(plan.shell)}")
        return " ".join([*words, plan.append]).strip()

    def wait_until(self, condition: Callable[[], bool], deadline: float, what: str) -> None:
        """Waits for ``condition`` (looked at whenever the guest says something) until ``deadline``.

        Raises GuestTimeout then, and GuestFailure as soon as it can no longer come true.
        """
        while True:
            with self._streams.changed:
                if condition():
                    return
                self._streams.changed.wait(LOOK_INTERVAL)
                if condition():
                    return
            self._check()
            if time.monotonic() > deadline:
                raise GuestTimeout(f"the guest did not {what} in time", self._last_lines())

    def _last_lines(self) -> list[str]:
        with self._streams.changed:
            return self._streams.console.last_lines()

    def _check(self) -> None:
        console = self._streams.console
        if console.panic is not None:
            time.sleep(REPORT_PATIENCE)
            raise GuestFailure(f"the guest died: {console.panic}", self._last_lines())
        if console.booting and console.trouble is not None:
            time.sleep(REPORT_PATIENCE)
            if console.booting:  # it may have come up all the same
                with self._streams.changed:
                    report = list(console.report)
                raise GuestFailure(f"the guest did not come up: {console.trouble}", report)
        status = self.qemu.status
        if status is not None:
            time.sleep(LOOK_INTERVAL)  # what it wrote last is still on its way
            if self._streams.console.panic is not None:
                self._check_panic_message()
            words = self.qemu.last_words()
            how = "the guest powered off" if status == 0 else f"QEMU ended with status {status}"
            text = f"{how} before it was asked to" + (f"\n{words}" if words else "")
            raise GuestFailure(text, self._last_lines())
        if not self.backends_may_end:
            for backend in self.backends:
                if problem := backend.problem:
                    raise GuestFailure(problem, self._last_lines())

    def _check_panic_message(self) -> None:
        raise GuestFailure(f"the guest died: {self._streams.console.panic}", self._last_lines())

    def wait_ready(self, timeout: float = 120.0, boots: int = 1) -> None:
        """Waits until the guest's agent has said ``boots`` times that it is ready."""
        control = self._streams.control
        deadline = time.monotonic() + timeout
        self.wait_until(lambda: control.ready >= boots, deadline, "come up")

    @property
    def boots(self) -> int:
        """The number of times that the guest has booted."""
        return self._streams.control.ready

    def submit(self, script: str | bytes) -> int:
        """Asks the agent to run a shell script; returns the number of the request."""
        data = script.encode() if isinstance(script, str) else script
        self._requests += 1
        self._streams.send("control", Control.run_request(self._requests, data))
        return self._requests

    def run(
        self,
        script: str | bytes,
        timeout: float = 120.0,
        *,
        stdout: Sink | None = None,
        stderr: Sink | None = None,
    ) -> Result:
        """Runs a shell script as root in the guest and waits for its end.

        Output goes to the sinks as it comes, or else into the result.
        """
        out, err = bytearray(), bytearray()
        self._streams.lost.clear()
        self._streams.stdout = stdout or out.extend
        self._streams.stderr = stderr or err.extend
        boots = self.boots
        control = self._streams.control
        number = self.submit(script)
        try:
            self.wait_until(
                lambda: number in control.exits or self.boots != boots,
                time.monotonic() + timeout,
                "finish the command",
            )
            if number not in control.exits:
                raise GuestFailure("the guest rebooted while the command ran", self._last_lines())
        finally:
            self._streams.stdout = self._streams.stderr = discard
        return Result(control.exits[number], bytes(out), bytes(err), dict(self._streams.lost))

    def check(self, script: str | bytes, timeout: float = 120.0) -> str:
        """Runs a script that has to succeed; returns its standard output."""
        result = self.run(script, timeout)
        if result.status != 0:
            text = (result.stdout[-2000:] + result.stderr[-4000:]).decode(errors="replace")
            raise GuestFailure(f"status {result.status} from: {script!r}\n{text}")
        return result.stdout.decode(errors="replace")

    def reboot(self, timeout: float = 120.0) -> None:
        """Reboots the guest the way its user would, and waits until it is up again."""
        boots = self.boots
        self.submit("reboot")
        self.wait_ready(timeout, boots + 1)

    def poweroff(self, timeout: float = POWEROFF_PATIENCE) -> None:
        """Shuts the guest down in order. Raises GuestTimeout if it does not end."""
        self._streams.send("control", b"poweroff\n")
        self.wait_end(timeout)

    def wait_end(self, timeout: float | None = None) -> None:
        """Waits until QEMU has ended by itself."""
        status = self.qemu.wait(timeout)
        if status is None:
            raise GuestTimeout("the guest did not power off in time", self._last_lines())
        if status != 0:
            words = self.qemu.last_words()
            raise GuestFailure(f"QEMU ended with status {status}\n{words}", self._last_lines())

    def close(self) -> None:
        """Ends everything and leaves nothing behind, except the console log of a failure.

        Excepted are the console log of a failure, and what devices wrote.
        """
        if self._monitor is not None:
            if self.qemu.status is None:
                with contextlib.suppress(VmError):
                    self._monitor.command("quit", patience=2.0)
            self._monitor.close()
        if self._qemu is not None and self._qemu.wait(3.0) is None:
            self._qemu.terminate(2.0)
        for backend in self.backends:
            backend.stop()
        for output in self.outputs:
            output.close()
        self._streams.close()
        self._log.close()
        if not self.failed and self.plan.console_log is None:
            self._log_path.unlink(missing_ok=True)
        self._folder.close()
