# SPDX-License-Identifier: GPL-2.0-or-later
"""Cases of ``kmcl_guest.py``: channels, processes and modules come and go."""

import errno
import json
import os
import resource
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import vmbus_user
from kmcl_support import (
    OBEDIENT,
    REFUSING,
    ask,
    digest,
    fails,
    hold_some,
    in_child,
    obedient,
    pattern,
    text,
    there_and_back,
)
from vmbus_user import PAGE, Channel, Memory


def case_who_owns_the_channel() -> None:
    vmbus_user.bind(OBEDIENT)
    node = vmbus_user.find_node(OBEDIENT)
    with Channel(node) as first, Channel(node) as second:
        info = first.info
        assert (info.abi, info.state) == (1, vmbus_user.CLOSED)
        assert bytes(info.user_defined) == bytes(range(120))
        for channel in (first, second):
            with fails(errno.ENOTCONN):
                channel.send(b"")
            with fails(errno.ENOTCONN):
                channel.close()
        for send, receive in ((0, 2), (1, 2), (2, 1), (2, 1023), (513, 512), (1 << 31, 1 << 31)):
            with fails(errno.EINVAL):
                first.open(send, receive)
        with fails(errno.EINVAL):
            first.open(user_data=bytes(121))
        first.open(user_data=b"user data")
        assert bytes.fromhex(ask(first, "counts")["user_data"]) == b"user data".ljust(120, b"\0")
        with fails(errno.EBUSY):
            first.open()
        with fails(errno.EBUSY):
            second.open()
        for call in (second.close, second.wait, second.receive, lambda: second.send(b"")):
            with fails(errno.EBUSY):
                call()
        with fails(errno.EBUSY):
            second.create_gpadl(PAGE)
        assert second.info.state == vmbus_user.OPEN
        first.close()
        second.open(2, 1022)
        there_and_back(second, 2)


def case_open_and_close_again() -> None:
    with obedient() as channel:
        before = ask(channel, "counts")["opens"]
        for index in range(30):
            channel.close()
            channel.open(2 + index, 32 - index)
            there_and_back(channel, 1 + index % 3)
        counts = ask(channel, "counts")
        assert counts["opens"] == before + 30
        assert counts["errors"] == {}


def case_the_host_refuses() -> None:
    vmbus_user.bind(REFUSING)
    with Channel(vmbus_user.find_node(REFUSING)) as channel:
        for _ in range(5):
            with fails(errno.ECONNREFUSED):
                channel.open()
            assert channel.info.state == vmbus_user.CLOSED


def case_locked_memory_is_limited() -> None:
    with obedient() as channel:
        memory = Memory(64 * PAGE)

        def as_nobody() -> None:
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (16 * PAGE, 16 * PAGE))
            os.setuid(65534)
            there_and_back(channel, 16)
            with fails(errno.ENOMEM):
                channel.send(text("digest"), [memory.range()])
            channel.send(text("hold", key=1), [memory.range(0, 10 * PAGE)])
            with fails(errno.ENOMEM):
                channel.send(text("hold", key=2), [memory.range(0, 10 * PAGE)])
            with fails(errno.ENOMEM):
                channel.create_gpadl(memory)
            ask(channel, "release", keys=[1])
            there_and_back(channel, 16)

        _, status = os.waitpid(in_child(as_nobody), 0)
        assert status == 0


def case_close_with_packets_in_flight() -> None:
    memory = Memory(16 * PAGE)
    for index in range(12):
        channel = obedient()
        hold_some(channel, memory, forgotten=index < 2)
        assert channel.info.pinned_pages == 64 * 16
        if index % 2:
            channel.close()
            assert channel.info.state == vmbus_user.CLOSED
        channel.release()
    with obedient() as channel:
        there_and_back(channel, 16)


def case_close_under_waiting_threads() -> None:
    channel = obedient()
    memory = Memory(PAGE)
    number = channel.send(text("hold", key=0), [memory.range()])
    results: list[int | None] = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
            results.append(None)
        except OSError as error:
            results.append(error.errno)

    waits: list[Callable[[], object]] = [
        lambda: channel.wait(number),
        channel.wait,
        channel.receive,
    ]
    threads = [threading.Thread(target=attempt, args=(call,)) for call in waits]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    channel.close()
    for thread in threads:
        thread.join(10)
    assert results == [errno.ESHUTDOWN] * 3, results
    channel.open()
    there_and_back(channel, 1)
    channel.release()


def case_killed_with_packets_in_flight() -> None:
    def be_killed(forgotten: bool) -> None:
        channel = obedient()
        hold_some(channel, Memory(16 * PAGE), forgotten=forgotten)
        channel.create_gpadl(Memory(20 * PAGE))
        threading.Thread(target=channel.receive, daemon=True).start()
        os.write(writer, b"x")
        channel.wait()

    for index in range(8):
        reader, writer = os.pipe()
        pid = in_child(lambda index=index: be_killed(index == 0))
        assert os.read(reader, 1) == b"x"
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        os.close(reader)
        os.close(writer)
        with obedient() as channel:
            assert channel.info.pinned_pages == 0
            there_and_back(channel, 4)


def case_a_signal_ends_a_wait() -> None:
    with obedient() as channel:
        memory = Memory(PAGE)
        number = channel.send(text("hold", key=5), [memory.range()])

        class Alarm(Exception):
            pass

        def alarm(*unused: object) -> None:
            raise Alarm

        signal.signal(signal.SIGALRM, alarm)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            channel.wait(number)
            raise AssertionError("the wait went on")
        except Alarm:
            pass
        ask(channel, "release", keys=[5])
        channel.wait(number, 10)


def instance_of(node: os.PathLike[str]) -> str:
    return os.path.basename(node)


def case_unbound_with_packets_in_flight() -> None:
    for index in range(5):
        channel = obedient()
        node = vmbus_user.find_node(OBEDIENT)
        hold_some(channel, Memory(4 * PAGE), forgotten=index == 0)
        channel.create_gpadl(Memory(4 * PAGE))
        results: list[int | None] = []

        def wait(channel: Channel = channel, results: list[int | None] = results) -> None:
            try:
                channel.wait()
            except OSError as error:
                results.append(error.errno)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        (vmbus_user.DRIVER / "unbind").write_text(instance_of(node))
        thread.join(10)
        assert results == [errno.ESHUTDOWN]
        for call in (channel.wait, channel.open, channel.close, lambda c=channel: c.send(b"")):
            with fails(errno.ENODEV):
                call()
        assert channel.info.state == vmbus_user.GONE
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        assert poller.poll(0)[0][1] & select.POLLHUP
        assert not node.exists()
        (vmbus_user.DRIVER / "bind").write_text(instance_of(node))
        with obedient() as second:
            there_and_back(second, 4)
        channel.release()


def case_the_module_comes_and_goes() -> None:
    channel = obedient()
    done = subprocess.run(["rmmod", "vmbus_user"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "in use" in done.stderr
    hold_some(channel, Memory(4 * PAGE))
    channel.release()
    for index in range(15):
        subprocess.run(["rmmod", "vmbus_user"], check=True)
        assert not vmbus_user.DRIVER.exists()
        if index % 2:
            subprocess.run(
                ["modprobe", "vmbus_user", f"class_id={OBEDIENT},{REFUSING}"], check=True
            )
        channel = obedient()
        there_and_back(channel, 2)
        hold_some(channel, Memory(4 * PAGE), 8)
        channel.release()
    done = subprocess.run(["rmmod", "vmbus_user"], check=True)
    done = subprocess.run(
        ["modprobe", "vmbus_user", "class_id=not-a-guid"], capture_output=True, text=True
    )
    assert done.returncode != 0
    with obedient() as channel:
        there_and_back(channel, 1)


def wait_for_file(name: str) -> None:
    deadline = time.monotonic() + 60
    while not os.path.exists(name):
        assert time.monotonic() < deadline, f"no {name}"
        time.sleep(0.02)


def reopened(patience: float = 20.0) -> Channel:
    """A channel of the device that is there, or comes."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return obedient()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def case_the_device_leaves_and_comes_back() -> None:
    """The host takes its offer back of its own will, and makes it again."""
    for seconds in (0, 0.5, 0):
        channel = reopened()
        there_and_back(channel, 4)
        hold_some(channel, Memory(4 * PAGE), 8)
        channel.create_gpadl(Memory(4 * PAGE))
        # Sending and waiting are two calls; the device may have left between them.
        with fails(errno.ESHUTDOWN, errno.ENODEV):
            channel.request(text("leave", seconds=seconds), timeout=30)
        with fails(errno.ENODEV):
            channel.open()
        channel.release()
    with reopened() as channel:
        there_and_back(channel, 4)


def beside_a_back_end_that_is_killed(folder: str) -> None:
    """Told by files: "ready", and then "killed", "away", and then "back" or "gone"."""
    with obedient() as channel:
        there_and_back(channel, 4)
        hold_some(channel, Memory(4 * PAGE), 8)
        os.mknod(f"{folder}/ready")
        wait_for_file(f"{folder}/killed")
        memory = Memory(4 * PAGE)
        memory[:] = data = pattern(9, 4 * PAGE)
        number = channel.send(text("digest"), [memory.range()], timeout=5)
        with fails(errno.ETIMEDOUT):
            channel.wait(number, 0.3)
        os.mknod(f"{folder}/away")
        wait_for_file(f"{folder}/back")
        # What was still in the ring is done. What the back end had taken comes to the next one out
        # of the in-flight region, which holds it like the first.
        answer = json.loads(channel.wait(number, 20).payload.rstrip(b"\0"))
        assert answer["sha256"] == digest(data)
        with fails(errno.ETIMEDOUT):
            channel.wait(0, 0.2)
        info = channel.info
        assert (info.in_flight, info.pinned_pages) == (8, 32)
        there_and_back(channel, 4, pinned=32)
        ask(channel, "release", keys=[0, 3, 5])
        keys = {json.loads(channel.wait(0, 5).payload.rstrip(b"\0"))["key"] for _ in range(3)}
        assert keys == {0, 3, 5}
        there_and_back(channel, 4, pinned=20)
        channel.close()
        channel.open()
        there_and_back(channel, 4)


def without_a_back_end(folder: str) -> None:
    """The back end dies, then the user does; the channel closes all the same."""

    def be_killed() -> None:
        channel = obedient()
        hold_some(channel, Memory(4 * PAGE), 8)
        channel.create_gpadl(Memory(4 * PAGE))
        os.write(writer, b"x")
        channel.wait()

    reader, writer = os.pipe()
    pid = in_child(be_killed)
    assert os.read(reader, 1) == b"x"
    os.mknod(f"{folder}/ready")
    wait_for_file(f"{folder}/killed")
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    with Channel(vmbus_user.find_node(OBEDIENT)) as channel:
        assert channel.info.state == vmbus_user.CLOSED
        with fails(errno.ECONNREFUSED):
            channel.open()
    subprocess.run(["rmmod", "vmbus_user"], check=True)
    os.mknod(f"{folder}/away")
    wait_for_file(f"{folder}/back")
    deadline = time.monotonic() + 20
    while True:
        try:
            channel = obedient()
            break
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    there_and_back(channel, 4)
    channel.release()


def beside_a_device_that_is_unplugged(folder: str) -> None:
    """Told "ready"; tells "gone" and waits for a new device. Packets are in flight meanwhile."""
    channel = obedient()
    node = vmbus_user.find_node(OBEDIENT)
    there_and_back(channel, 4)
    hold_some(channel, Memory(4 * PAGE), 8)
    channel.create_gpadl(Memory(4 * PAGE))
    os.mknod(f"{folder}/ready")
    with fails(errno.ESHUTDOWN):
        channel.wait(0, 30)
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    deadline = time.monotonic() + 30
    while not any(events & select.POLLHUP for _, events in poller.poll(0)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for call in (channel.wait, channel.open, channel.close, lambda: channel.send(b"")):
        with fails(errno.ENODEV):
            call()
    while node.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.mknod(f"{folder}/gone")
    with obedient() as second:  # waits for the new device
        there_and_back(second, 4)
    channel.release()
