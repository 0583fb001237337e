# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with disks of the same bytes from different servers, and the measurements on them.

The disks:

* ``ours``: hv_storvsc, its back end a process in Python;
* ``virtio``: virtio-blk in QEMU itself, ``cache=writeback`` (the host's cache, as ours);
* ``blind`` (translation only): ours, but the back end takes the code map and never looks at it.

They take turns within each round, in the opposite order every other round, so that whatever else
the machine does hits all of them; the figure is the median of the rounds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from benchmarks.disk import IMAGE_SIZE, make_image
from benchmarks.guest import plain_guest
from benchmarks.table import HostTime
from vhostvmbus.vm import images
from vhostvmbus.vm.backend import BackEndProcess
from vhostvmbus.vm.initramfs import sbin_tool
from vhostvmbus.vm.machine import Machine
from vhostvmbus.wire.vmbus import PAGE_SIZE

KERNEL = "6.1"
ROUNDS = 3
OURS, VIRTIO, BLIND = "ours", "virtio", "blind"
PROGRAMS = images.TREE / "tests" / "vm" / "programs"
BLIND_SERVE = (sys.executable, str(PROGRAMS / "serve_without_invalidation.py"))
BLIND_INSTANCE = UUID("5e6b4c1e-7f0d-4a53-9d55-0a3c5f1b7e21")
STARTS = 15
"""How many programs are started from a cold cache, for each figure."""
CODE_TRIES = 300
"""How many reads of code tell how many make up a measurement."""
PATIENCE = 120.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Pattern:
    """The work that fio does.

    ``processor`` is the guest's that it runs on: the "same" one as the channel interrupts, the
    "other" one, or "any".
    """

    title: str
    kind: str
    block: str
    depth: int
    processor: str = "any"

    def __str__(self) -> str:
        where = "" if self.processor == "any" else f", {self.processor} CPU"
        return f"{self.title}, depth {self.depth}{where}"


FIND_DISKS = """\
# Each disk's serial number, its name, and the processor that its channel interrupts.
for disk in /sys/block/sd*; do
    echo "$(tail -c +5 $disk/device/vpd_pg80) ${disk##*/} \
        $(cat $disk/device/../../../channels/*/cpu | head -n 1)"
done
for disk in /sys/block/vd*; do
    echo "$(cat $disk/serial) ${disk##*/} 0"
done
"""

COLD_STARTS = """\
# DEVICE PROGRAMS: prints how many were started, and the nanoseconds that took
set -e
mount -o ro,noload /dev/$1 /mnt
mount --bind /dev /mnt/dev
sync
echo 3 >/proc/sys/vm/drop_caches
begin=$(date +%s%N)
chroot /mnt /bin/sh -c '
    step=$(($(ls /usr/bin | wc -l) / $1)) number=0
    for program in /usr/bin/*; do
        number=$((number + 1))
        [ $((number % step)) -eq 0 ] || continue
        timeout -s KILL 20 "$program" --version </dev/null >/dev/null 2>&1 || :
        echo started
    done' sh $2 | wc -l
echo $(($(date +%s%N) - begin))
umount /mnt/dev /mnt
"""


@dataclass
class Sample:
    """One measurement."""

    per_second: float
    back_end_cpu: float | None = None
    """Microseconds of the back end's processor time for each request."""
    machine_cpu: float | None = None
    """The same of QEMU's processor time: its virtual processors, its main loop and, for its own
    disk, the device.
    """
    back_end_busy: float | None = None
    """The part of the time that the back end's busiest thread was running."""
    machine_busy: float | None = None
    """The part of the time that QEMU's busiest thread was running: mostly one of the guest's
    processors.
    """
    host_busy: float | None = None
    """The part of all processors' time that was used, by whomever."""
    latency: float | None = None
    """The median time from submission to completion as the guest sees it, in microseconds."""
    wrong: float | None = None
    """The percentage of the calls that ran code which was no longer there."""


@dataclass
class Disk:
    """One disk: who serves it, and its devices in the guest."""

    name: str
    data: str
    """The device with random bytes, behind two blocks of code."""
    root: str
    """The device with a file system to start programs from; read-only."""
    image: Path
    """The file behind ``data``."""
    processor: int
    """The guest's processor that the channel interrupts; virtio has a queue for each."""
    pid: int | None
    """The back end's process; ``None`` for QEMU itself."""

    def warm(self) -> None:
        """Brings the image back to the page cache, in case the host wanted the memory."""
        with self.image.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


@dataclass(frozen=True)
class Use:
    """The use that a process made of the processors.

    It is the seconds in all, and the part of the time that its busiest thread was running.
    """

    seconds: float
    busiest: float

    @classmethod
    def between(cls, then: dict[int, float], now: dict[int, float], taken: float) -> Use:
        """Returns the use between two looks at the threads, ``taken`` seconds apart.

        A thread that ended is not counted.
        """
        used = [seconds - then.get(thread, 0.0) for thread, seconds in now.items()]
        return cls(sum(used), max(used, default=0.0) / taken)


def thread_times(pid: int) -> dict[int, float]:
    """Returns the processor seconds of each thread of a process, in user and in kernel space."""
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended just now
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            times[int(task.name)] = (int(fields[11]) + int(fields[12])) / TICKS
    return times


@dataclass
class Lab:
    """The running machine, its disks, and the measurements on them."""

    machine: Machine
    accel: str
    disks: list[Disk]
    seconds: float
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)

    def alternate(self, what: str, names: Sequence[str], take: Callable[[Disk], Sample]) -> None:
        """Measures ``what`` on the disks in turn, for all rounds."""
        print(f"  {what} ...", file=sys.stderr, flush=True)
        chosen = [disk for disk in self.disks if disk.name in names]
        for number in range(ROUNDS):
            for disk in chosen if number % 2 == 0 else chosen[::-1]:
                self.samples.setdefault((what, disk.name), []).append(take(disk))

    def median(self, what: str, name: str, of: str = "per_second") -> float:
        """Returns the median, over the rounds, of an attribute of the samples."""
        values: list[float] = [getattr(sample, of) for sample in self.samples[what, name]]
        return statistics.median(values)

    def spread(self, what: str, name: str) -> float:
        """Returns how far the rounds are apart, in percent of their median."""
        rates = [sample.per_second for sample in self.samples[what, name]]
        return (max(rates) - min(rates)) / statistics.median(rates) * 100

    def fio(self, disk: Disk, pattern: Pattern) -> Sample:
        """Runs fio once on the raw disk, past the guest's page cache."""
        limit = f"--time_based --runtime={round(self.seconds * 1000)}ms"
        if pattern.processor != "any":
            limit += f" --cpus_allowed={disk.processor ^ (pattern.processor == 'other')}"
        disk.warm()
        job, host, machine, device = self._run_fio(
            disk,
            f"--rw={pattern.kind} --bs={pattern.block} --iodepth={pattern.depth} {limit}",
        )
        figures = job["write" if pattern.kind == "randwrite" else "read"]
        count = figures["total_ios"]
        return Sample(
            figures["iops"],
            device.seconds / count * 1e6,
            machine.seconds / count * 1e6,
            device.busiest,
            machine.busiest,
            host.busy / host.everything,
            figures["lat_ns"]["percentile"]["50.000000"] / 1000,
        )

    def _run_fio(self, disk: Disk, words: str) -> tuple[Any, HostTime, Use, Use]:
        """Runs fio. Returns its report, and the use of processors by all, QEMU and the back end.

        That use is of the time of the requests only: a script before and one behind it write to the
        port of the guest's standard error, which is heard at once.
        """
        errors = bytearray()
        times: list[tuple[HostTime, dict[int, float], dict[int, float]]] = []

        def heard(data: bytes) -> None:
            errors.extend(data)
            while len(times) < errors.count(b"mark"):
                device = thread_times(disk.pid) if disk.pid is not None else {}
                times.append((HostTime.now(), thread_times(self.machine.qemu.pid), device))

        mark = "sh -c 'echo mark >/dev/ttyS2'"
        result = self.machine.run(
            f"cd /tmp && fio --name=run --filename=/dev/{disk.data} --direct=1 --ioengine=libaio "
            f"--thread --norandommap --offset=1m --size={(IMAGE_SIZE >> 20) - 1}m "
            "--lat_percentiles=1 --clat_percentiles=0 --percentile_list=50 "
            f'--exec_prerun="{mark}" --exec_postrun="{mark}" --output-format=json {words}',
            PATIENCE + self.seconds,
            stderr=heard,
        )
        if result.status != 0 or len(times) != 2:
            raise RuntimeError(f"fio: {result} {errors.decode(errors='replace')}")
        text = result.stdout.decode()
        report = json.loads(text[text.index("{") :])["jobs"][0]
        (begin, *before), (end, *after) = times
        host = end - begin
        machine, device = (
            Use.between(then, now, host.elapsed) for then, now in zip(before, after, strict=True)
        )
        return report, host, machine, device

    def code_reads(self, disk: Disk) -> Sample:
        """Reads into a page whose code has just been executed, each followed by a call of it."""
        taken, _ = self._code_reads(disk, CODE_TRIES)
        tries = max(CODE_TRIES, round(CODE_TRIES / taken * self.seconds))
        taken, wrong = self._code_reads(disk, tries)
        return Sample(tries / taken, wrong=wrong / tries * 100)

    def _code_reads(self, disk: Disk, tries: int) -> tuple[float, int]:
        text = self.machine.check(
            "begin=$(date +%s%N)\n"
            f"/tmp/stale_code /dev/{disk.data} {tries} 1 || [ $? = 1 ]\n"
            "echo $(($(date +%s%N) - begin))",
            PATIENCE + 10 * self.seconds,
        )
        found = re.search(r"wrong=(\d+) tries=\d+\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"stale_code said {text!r}")
        return int(found[2]) / 1e9, int(found[1])

    def cold_starts(self, disk: Disk) -> Sample:
        """Starts programs of a root file system, with nothing of it in the guest's cache."""
        count, nanoseconds = self.machine.check(
            f"set -- {disk.root} {STARTS}\n{COLD_STARTS}", PATIENCE
        ).split()
        return Sample(int(count) / int(nanoseconds) * 1e9)


def code(value: int) -> bytes:
    """Returns an x86 function that returns ``value``, in a block of its own."""
    return (b"\xb8" + value.to_bytes(4, "little") + b"\xc3").ljust(PAGE_SIZE, b"\xcc")


def make_disks(folder: Path) -> None:
    """Makes the images: a data disk for each server, one root file system, one program."""
    first = folder / f"{OURS}.raw"
    make_image(first)
    with first.open("r+b") as file:
        file.write(code(1) + code(2))
    for name in (VIRTIO, BLIND):
        shutil.copyfile(first, folder / f"{name}.raw")
    images.copy_sparse(images.root_template(), folder / "root.img")
    # So that the guest does not take it for the disk to boot from.
    subprocess.run(
        [sbin_tool("e2label"), folder / "root.img", "programs"], check=True, stdout=sys.stderr
    )
    program = folder / "program.raw"
    source = PROGRAMS / "stale_code.c"
    subprocess.run(["cc", "-O2", "-static", "-o", program, source], check=True)
    os.truncate(program, -(-program.stat().st_size // PAGE_SIZE) * PAGE_SIZE)


def disk_words(folder: Path, name: str) -> list[str]:
    """Returns the words for the disks of one of our controllers."""
    return [f"{folder}/{name}.raw,serial={name}-data", f"{folder}/root.img,ro,serial={name}-root"]


def qemu_words(folder: Path, blind: Path | None) -> list[str]:
    """Returns the words for the devices of the machine that it would not have by itself."""
    words = []
    for name, image, more in (
        (f"{VIRTIO}-data", f"{VIRTIO}.raw", ""),
        (f"{VIRTIO}-root", "root.img", ",readonly=on"),
        ("program", "program.raw", ",readonly=on"),
    ):
        file = str(folder / image).replace(",", ",,")
        words += ["-drive", f"if=none,id={name},file={file},format=raw,cache=writeback{more}"]
        words += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
    if blind is not None:
        path = str(blind).replace(",", ",,")
        words += ["-chardev", f"socket,id=blind,path={path},reconnect-ms=250"]
        words += ["-device", f"vhost-user-vmbus,chardev=blind,instanceid={BLIND_INSTANCE}"]
    return words


@contextmanager
def open_lab(seconds: float) -> Iterator[Lab]:
    """Starts a guest with all disks, and gives it once it is up."""
    guest = plain_guest(KERNEL)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vhostvmbus-")))
        print("  making disks and booting a guest ...", file=sys.stderr, flush=True)
        make_disks(folder)
        blind = None
        if guest.accel == "tcg":
            blind = BackEndProcess(BLIND, ["scsi", *disk_words(folder, BLIND)], folder, BLIND_SERVE)
            stack.callback(blind.stop)
        plan = replace(
            guest,
            disks=disk_words(folder, OURS),
            extra=qemu_words(folder, blind.socket if blind else None),
        )
        machine = stack.enter_context(Machine(plan))
        machine.wait_ready()
        lines = [line.split() for line in machine.check(FIND_DISKS).splitlines()]
        devices = {words[0]: words[1] for words in lines}
        processors = {words[0]: int(words[2]) for words in lines}
        size = (folder / "program.raw").stat().st_size
        machine.check(
            f"head -c {size} /dev/{devices['program']} >/tmp/stale_code; chmod +x /tmp/stale_code"
        )
        pids = {OURS: machine.backends[0].child.pid, VIRTIO: None}
        if blind is not None:
            pids[BLIND] = blind.child.pid
        disks = [
            Disk(
                name,
                devices[f"{name}-data"],
                devices[f"{name}-root"],
                folder / f"{name}.raw",
                processors[f"{name}-data"],
                pid,
            )
            for name, pid in pids.items()
        ]
        yield Lab(machine, guest.accel, disks, seconds)
        machine.poweroff()
