# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock guest with one card of four queues, and the other end of its cable.

The other end is a TAP in a network namespace that is made for the test.
"""

import contextlib
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhostvmbus.devices.net.link.namespace import call_in
from vhostvmbus.observe.statistics import read_statistics
from vhostvmbus.vm.backend import BackEndProcess
from vhostvmbus.vm.machine import Machine

MAC = bytes.fromhex("525400000003")
HOST4, GUEST4, HOST6, GUEST6 = "10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2"
QUEUES = 4
NET_CHARDEV = "vmbus1"
"""The second back end's character device: the first is the root disk's."""
MODULE = "for i in $(seq 100); do [ -e /sys/class/net/eth0 ] && break; sleep 0.1; done"
ADDRESSES = (
    f"ip addr add {GUEST4}/24 dev eth0; ip addr add {GUEST6}/64 dev eth0 nodad; "
    "ip link set eth0 up; "
    "for i in $(seq 100); do [ $(cat /sys/class/net/eth0/carrier) = 1 ] && break; sleep 0.1; done"
)
FLOWS = """
flows() {
    cd /sys/class/net/eth0/statistics
    set -- $(($(cat rx_bytes) + $1)) $(($(cat tx_bytes) + $1))
    for i in $(seq 300); do
        [ $(cat rx_bytes) -ge $1 ] && [ $(cat tx_bytes) -ge $2 ] && return
        sleep 0.1
    done
    echo "traffic stands still: rx_bytes $(cat rx_bytes) of $1, tx_bytes $(cat tx_bytes) of $2" >&2
    cat /tmp/traffic >&2
    ethtool -S eth0 >&2
    return 1
}
"""
"""A shell function for the guest: ``flows BYTES`` waits until so many more came and went."""
TROUBLE = re.compile(
    r"^.*(?:WARNING|BUG|Oops|Call Trace|hung task|hv_netvsc .*(?:[Uu]nable|fail|error)).*$", re.M
)


@dataclass(frozen=True)
class Rig:
    """A guest with one card, and the place of the other end of its cable."""

    machine: Machine
    namespace: str

    def guest(self, script: str, timeout: float = 120.0) -> str:
        return self.machine.check(FLOWS + script, timeout)

    def host(self, *words: str) -> str:
        """Runs a program at the other end of the cable."""
        return subprocess.run(
            self._there(*words), check=True, capture_output=True, text=True
        ).stdout

    def _there(self, *words: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *words]

    @property
    def tap(self) -> str:
        """The interface at the other end."""
        names = [line.split()[0] for line in self.host("ip", "-br", "link").splitlines()]
        return next(name for name in names if name.startswith("vmbus"))

    @property
    def backend(self) -> BackEndProcess:
        """The card's back end."""
        return next(backend for backend in self.machine.backends if backend.name == "net0")

    def statistics(self) -> dict[str, Any]:
        """Returns what ``vhostvmbus stats`` shows."""
        return read_statistics(self.backend.socket)

    def card(self) -> dict[str, Any]:
        """Returns the card's own part of the statistics."""
        found: dict[str, Any] = self.statistics()["device"]
        return found

    def bring_up(self) -> None:
        """Brings up an interface that is new in the guest."""
        self.guest(f"{MODULE}; {ADDRESSES}")

    def ping(self, size: int = 56, address: str = HOST4) -> None:
        """Pings three times, and loses none. A card that was just set up anew gets some time."""
        deadline = time.monotonic() + 15
        while True:
            text = self.machine.run(f"ping -c 3 -i 0.2 -s {size} -M do {address}").stdout.decode()
            if " 0% packet loss" in text:
                return
            assert time.monotonic() < deadline, text

    def counter(self, name: str) -> int:
        """Returns one of the guest's counters in ``/proc/net/snmp``, as ``Udp.InErrors``."""
        group, field = name.split(".")
        head, values = re.findall(rf"^{group}: (.*)$", self.guest("cat /proc/net/snmp"), re.M)
        return int(values.split()[head.split().index(field)])

    @contextlib.contextmanager
    def nothing_wrong(self) -> Iterator[None]:
        """Fails if the guest's kernel or the card has anything to complain about meanwhile."""
        before = self.card()["errors"]
        self.guest("dmesg -C")
        yield
        print("the card:", json.dumps(self.statistics(), indent=1))  # shown if anything failed
        print("the back end:", self.backend.child.log.read_text()[-4000:])
        print(self.machine.run("ip -s link show eth0; ethtool -S eth0; cat /tmp/traffic"))
        found = trouble(self.machine)
        assert found == [], found
        errors = self.card()["errors"]
        assert errors == before, f"{before} before, now {errors}"

    @contextlib.contextmanager
    def iperf_server(self) -> Iterator[None]:
        words = self._there("iperf3", "--server", "--forceflush")
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            # It says something each second; once the pipe were full, it would do nothing more.
            listener = threading.Thread(target=server.stdout.read)
            try:
                while "Server listening" not in server.stdout.readline():
                    assert server.poll() is None
                listener.start()
                yield
            finally:
                server.kill()
                if listener.ident is not None:
                    listener.join()

    def iperf(self, address: str, words: str) -> dict[str, Any]:
        """Returns what iperf3 in the guest reports in the end, of a second against ``address``.

        Client and server of iperf3 3.12 may wait for each other at the end of several streams to
        the client, over any card (virtio-net, too; 1 of 30 to 100 times): there is another try.
        """
        client = f"timeout 20 iperf3 --client {address} --json --time 1 {words}"
        for _ in range(3):
            with self.iperf_server():
                result = self.machine.run(client, 60)
            if result.status != 124:
                break
        assert result.status == 0, (client, result)
        end: dict[str, Any] = json.loads(result.stdout)["end"]
        return end

    @contextlib.contextmanager
    def traffic(self, load: str = "-b 20M") -> Iterator[None]:
        """Runs iperf3 both ways, in the background; ``flows`` in the guest watches it.

        As in :meth:`iperf`, client and server may wait for each other. If nothing flows at the
        start, but the card carries pings of any size, there are two more tries; what both ends say
        of their connections is printed.
        """
        with contextlib.ExitStack() as server:
            for left in (2, 1, 0):
                server.enter_context(self.iperf_server())
                begun = self.machine.run(
                    f"{FLOWS}iperf3 --client {HOST4} --bidir --time 3600 {load} "
                    ">/tmp/traffic 2>&1 </dev/null & echo $! >/tmp/traffic.pid; flows 65536"
                )
                if begun.status == 0:
                    break
                print("here:", self.host("ss", "-tnmiop"))
                print("in the guest:", self.machine.run("ss -tnmiop").stdout.decode())
                assert left, begun
                self.ping()
                self.ping(1472)
                self.guest("kill $(cat /tmp/traffic.pid)")
                server.close()
            yield
            self.guest("[ ! -e /tmp/traffic.pid ] || kill $(cat /tmp/traffic.pid)")

    @contextlib.contextmanager
    def echo(self) -> Iterator[int]:
        """Runs a TCP server that gives back what it gets. Gives its port."""

        def listen() -> socket.socket:
            return socket.create_server((HOST4, 0))

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(60)
                while data := connection.recv(1 << 18):
                    connection.sendall(data)

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        with call_in(self.namespace, listen) as server:
            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield server.getsockname()[1]
            finally:
                server.shutdown(socket.SHUT_RDWR)
                thread.join()


def copy_in(rig: Rig, source: Path, target: str) -> None:
    """Copies a file of the host's into the guest, over its card."""

    def listen() -> socket.socket:
        server = socket.create_server((HOST4, 0))
        server.settimeout(60)
        return server

    def serve() -> None:
        connection, _ = server.accept()
        with connection, open(source, "rb") as file:
            connection.sendfile(file)

    with call_in(rig.namespace, listen) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        port = server.getsockname()[1]
        rig.guest(f"rm -f {target}; socat -u TCP:{HOST4}:{port} CREATE:{target}")
        thread.join()


def trouble(machine: Machine) -> list[str]:
    """Returns what the guest's kernel complains about."""
    return TROUBLE.findall(machine.check("dmesg -t"))


def there_and_back(port: int, size: int = 1 << 20, address: str = HOST4) -> str:
    """Returns a shell command for the guest: random bytes to the echo and back, the same."""
    return (
        f"head -c {size} /dev/urandom >/tmp/sent; "
        f"socat -t 30 - TCP:{address}:{port} </tmp/sent | cmp - /tmp/sent"
    )
