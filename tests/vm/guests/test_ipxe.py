# SPDX-License-Identifier: GPL-2.0-or-later
"""iPXE, a boot program with drivers of its own: an old one and a newer one fetch a file.

The host's side is a network namespace without a name, with a "world" that has nobody in it. iPXE
is started as a kernel is; it takes the kernel's command line for commands, of which those that it
does not know harm nothing. Its console is the BIOS's, which goes to the serial port.
"""

import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.machines import MEBIBYTE
from tests.support.network import connect_to_the_world, private_network
from tests.support.soak import times
from vhostvmbus.observe.statistics import read_statistics
from vhostvmbus.vm import images
from vhostvmbus.vm.accel import choose
from vhostvmbus.vm.machine import Machine, MachinePlan

SIZE = times(8, 100) * MEBIBYTE
MEMORY = 256 * MEBIBYTE
PATIENCE = times(300, 1800)
HOST = "192.0.2.1"
"""The world's router, which stands for this machine."""
GUEST = "192.0.2.2"
SCRIPT = """\
#!ipxe
imgfetch --name data {base}/data
imgstat
imgfetch {base}/done?${{net0/ip}}
shell
"""


class FileServer(ThreadingHTTPServer):
    """Serves iPXE's script and the data, and notes that the script has come to its end."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.base = f"http://{HOST}:{self.server_port}"
        self.data = os.urandom(SIZE)
        self.asked = 0.0
        self.done = 0.0
        """When the data were asked for, and when iPXE had them."""
        self.address = ""
        """The address that iPXE has got."""


class Answer(BaseHTTPRequestHandler):
    """Answers one request."""

    server: FileServer

    def do_GET(self) -> None:
        name, _, words = self.path.partition("?")
        body = b""
        if name == "/script":
            body = SCRIPT.format(base=self.server.base).encode()
        elif name == "/data":
            body = self.server.data
            self.server.asked = time.monotonic()
        else:
            self.server.address = words
            self.server.done = time.monotonic()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Leaves the log alone."""


@contextmanager
def serving() -> Iterator[FileServer]:
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def holds(memory: Path, data: bytes) -> bool:
    """Whether the data are in that file, in one piece."""
    with (
        open(memory, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as found,
    ):
        at = found.find(data[:64])
        while at >= 0 and found[at : at + len(data)] != data:
            at = found.find(data[:64], at + 1)
        return at >= 0


@pytest.mark.parametrize("suite", ["bookworm", "trixie"])
def test_a_file_is_fetched_by_http(suite: str, qemu: Path, tmp_path: Path) -> None:
    program = images.recipe("guest-images/build", "ipxe", suite) / "ipxe.lkrn"
    nothing = tmp_path / "nothing"
    nothing.write_bytes(b"\n")
    with private_network():
        connect_to_the_world()
        with serving() as server:
            plan = MachinePlan(
                qemu=qemu,
                kernel=program,
                initramfs=nothing,
                accel=choose("auto").name,
                networks=["user"],
                append=f"; dhcp && chain {server.base}/script",
                smp=1,
                memory=f"{MEMORY // MEBIBYTE}M",
                machine="pc,graphics=off",
                console_log=tmp_path / "console",
            )
            with Machine(plan) as machine:
                shown = f"data : {SIZE} bytes".encode()
                machine.wait_until(
                    lambda: bool(server.done) and shown in console(machine),
                    time.monotonic() + PATIENCE,
                    "fetch the file",
                )
                memory = tmp_path / "memory"
                machine.monitor.command("pmemsave", val=0, size=MEMORY, filename=str(memory))
                card = read_statistics(machine.backends[0].socket)["device"]
    rate = SIZE / MEBIBYTE / (server.done - server.asked)
    print(f"iPXE of {suite}: {SIZE // MEBIBYTE} MiB at {rate:.1f} MiB/s, {card}")
    assert server.address == GUEST
    assert holds(memory, server.data)
    assert card["errors"] == {}


def console(machine: Machine) -> bytes:
    return machine.console_log.read_bytes()
