# SPDX-License-Identifier: GPL-2.0-or-later
"""What README.md tells one to type, typed: back ends and a QEMU without our command."""

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.support.network import connect_to_the_world, private_network, wait_for
from tests.support.paths import TREE
from vhostvmbus.vm import images

README = TREE / "README.md"
BOOT_SECONDS = 120


def commands() -> tuple[list[str], str]:
    """The lines that serve devices, and the one for QEMU."""
    section = README.read_text().partition("## A back end and a QEMU of your own")[2]
    serve, qemu = re.findall(r"```sh\n(.*?)```", section, re.S)[:2]
    lines = [line.partition("#")[0].strip() for line in serve.splitlines()]
    return [line for line in lines if line], qemu.replace("\\\n", " ").strip()


@contextlib.contextmanager
def running(words: list[str], log: Path, **more: object) -> Iterator[subprocess.Popen[bytes]]:
    with open(log, "wb") as output:
        process = subprocess.Popen(  # type: ignore[call-overload]
            words, stdout=output, stderr=subprocess.STDOUT, **more
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def test_a_disk_and_a_network_card(tmp_path: Path, qemu: Path, root_template: Path) -> None:
    kernel = images.find_kernel("6.1")
    (tmp_path / "vmlinuz").symlink_to(kernel.image)
    (tmp_path / "initramfs").symlink_to(images.find_initramfs(kernel))
    images.copy_sparse(root_template, tmp_path / "root.raw")
    (tmp_path / "data.raw").write_bytes(bytes(1 << 20))
    serve, line = commands()
    assert len(serve) == 2
    line = line.replace("/tmp/", f"{tmp_path}/").replace("$(qemu/build)", str(qemu))
    disk = f"-chardev socket,id=c0,path={tmp_path}/scsi.sock,reconnect-ms=250"
    assert disk in line
    # "A second chardev and device, likewise."
    likewise = disk.replace("c0", "c1").replace("scsi.sock", "net.sock")
    line += f" {likewise} -device vhost-user-vmbus,chardev=c1"
    setting, *words = shlex.split(line)
    environment = dict(os.environ, **dict([setting.split("=")]))
    log = tmp_path / "console"
    with private_network(), contextlib.ExitStack() as stack:
        connect_to_the_world()
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.settimeout(BOOT_SECONDS)
        for number, command in enumerate(serve):
            program, *rest = shlex.split(command.replace("/tmp/", f"{tmp_path}/"))
            assert program == "vhostvmbus"
            back_end = [sys.executable, "-m", "vhostvmbus", *rest]
            stack.enter_context(running(back_end, tmp_path / f"log{number}", cwd=tmp_path))
        for name in ("scsi", "net"):
            wait_for((tmp_path / f"{name}.sock").exists, f"the back end {name}", 30)

        heard: list[bytes] = []

        def hear() -> None:
            caller, _ = server.accept()
            with caller:
                caller.settimeout(BOOT_SECONDS)
                while data := caller.recv(4096):
                    heard.append(data)

        thread = threading.Thread(target=hear, daemon=True)
        thread.start()
        machine = stack.enter_context(
            running(words, log, cwd=tmp_path, env=environment, stdin=subprocess.PIPE)
        )
        wait_for(lambda: b"root@vhostvmbus" in log.read_bytes(), "a prompt", BOOT_SECONDS)
        assert machine.stdin is not None
        port = server.getsockname()[1]
        machine.stdin.write(
            b"/run/vhostvmbus/network wait 60; "
            b"(lsblk -bno SIZE | sort -n; ls /sys/bus/vmbus/drivers/hv_netvsc/*/net) | "
            b"socat -u - TCP:192.0.2.1:%d; poweroff\n" % port
        )
        machine.stdin.flush()
        thread.join(BOOT_SECONDS)
        assert b"".join(heard).decode().split() == [
            f"{1 << 20}",
            f"{2 << 30}",
            f"{(tmp_path / 'root.raw').stat().st_size}",
            "eth0",
        ], log.read_text(errors="replace")[-3000:]
        assert machine.wait(60) == 0
