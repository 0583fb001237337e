# SPDX-License-Identifier: GPL-2.0-or-later
"""The back end's process: a real server at a real socket, with the device of :mod:`.unruly`.

Run as ``python -m tests.liveness.backend FD`` it imports everything once and then makes back ends
by fork, one for each order that comes over the socket ``FD`` (:class:`~.process.Nursery`), which
costs milliseconds. Each back end has

* a *clock* in shared memory: a thread that counts a tick each :data:`TICK` seconds. A machine that
  is busy lets it fall behind as it does everything else in this process, so that what is measured
  in its ticks is the back end's own waiting, not the machine's;
* a *control* socket: lines of JSON by which the harness opens the device's gate, and asks which
  threads died of an exception that nobody took.
"""

from __future__ import annotations

import array
import contextlib
import faulthandler
import gc
import json
import logging
import mmap
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

from tests.liveness.mistakes import MISTAKES
from tests.liveness.patience import shorten
from tests.liveness.slow_disk import slow_controller
from tests.liveness.unruly import DEVICES, Gate
from vhostvmbus.device import Device, DeviceHost
from vhostvmbus.vhost_user.backchannel import ANSWER_TIMEOUT
from vhostvmbus.vhost_user.server import Server

TICK = 0.005
"""Seconds between two ticks of the clock."""
SLOWNESS = 1.5
"""Seconds that a slow program takes, before they are shortened as all others are."""


def main() -> None:
    """Makes back ends until the harness hangs up."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    # Whoever interrupts the tests interrupts the harness, which ends everything.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        size = array.array("i").itemsize
        data, ancillary, _, _ = orders.recvmsg(65536, socket.CMSG_SPACE(8 * size))
        if not data:
            return
        fds = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content[: len(content) - len(content) % size])
        order = json.loads(data)
        if "reap" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["reap"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                orders.close()
                _be_back_end(order, *fds)
        for fd in fds:
            os.close(fd)
        orders.sendall(json.dumps(answer).encode())


def _be_back_end(order: dict[str, Any], control_fd: int, clock_fd: int, log_fd: int) -> None:
    """Never returns."""
    try:
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.close(log_fd)
        code = _serve(order, socket.socket(fileno=control_fd), clock_fd)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stderr.flush()
    os._exit(code)


def _serve(order: dict[str, Any], control: socket.socket, clock_fd: int) -> int:
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(relativeCreated)7d %(message)s", force=True
    )
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    shorten(order["patience"])
    if "mistake" in order:
        MISTAKES[order["mistake"]]()
    slowness = SLOWNESS * order["patience"]
    device: Device
    if order["device"] in DEVICES:
        image = os.open(order["image"], os.O_RDWR | os.O_CLOEXEC)
        device = DEVICES[order["device"]](image, slowness, order["unplug"])
        gate = device.gate
    else:
        planned = order["device"] == "planned disk"
        device, gate = slow_controller(order["image"], slowness, planned)
    host = DeviceHost(device)
    server = Server(host, order["socket"], answer_timeout=ANSWER_TIMEOUT * order["patience"])
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    died: list[str] = []

    def note_death(death: threading.ExceptHookArgs) -> None:
        name = death.thread.name if death.thread else "?"
        died.append(f"thread {name}: {death.exc_type.__name__}: {death.exc_value}")
        traceback.print_exception(death.exc_value)

    threading.excepthook = note_death
    _start_clock(clock_fd)
    threading.Thread(
        target=_obey, args=(control, host, gate, died), name="control", daemon=True
    ).start()
    try:
        server.run(lambda: control.sendall(b'"ready"\n'))
    finally:
        host.close()
        gate.open()  # nothing is left to be held up: the disk's threads are waited for
    return 0


def _start_clock(fd: int) -> None:
    ticks = memoryview(mmap.mmap(fd, mmap.PAGESIZE)).cast("Q")  # written and read in one piece
    os.close(fd)

    def run() -> None:
        while True:
            time.sleep(TICK)
            ticks[0] += 1

    threading.Thread(target=run, name="clock", daemon=True).start()


def _obey(control: socket.socket, host: DeviceHost, gate: Gate, died: list[str]) -> None:
    """Does what the harness says; without the harness there is no back end either."""
    with contextlib.suppress(OSError), control.makefile("rw") as lines:
        for line in lines:
            match json.loads(line):
                case ["go", seconds]:
                    gate.open()
                    answer: object = gate.wait_ended(seconds)
                case ["remove the gate"]:
                    answer = gate.remove()
                case ["deaths"]:
                    answer = died
                case ["collect"]:
                    answer = gc.collect() and None
                case ["statistics"]:
                    answer = list(json.loads(json.dumps(host.stats())))
                case other:
                    answer = f"what is {other}?"
            lines.write(json.dumps(answer) + "\n")
            lines.flush()
    os._exit(71)


if __name__ == "__main__":
    main()
