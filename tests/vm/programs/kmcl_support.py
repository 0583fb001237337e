# SPDX-License-Identifier: GPL-2.0-or-later
"""What the cases of the guest's program share; see ``kmcl_guest.py``."""

import contextlib
import errno
import hashlib
import json
import os
import traceback
from collections.abc import Callable, Iterator

from vmbus_user import HOST_WRITES, PAGE, WAIT_FOR_COMPLETION, Channel, Memory

OBEDIENT = "b7f2a6d1-0c35-4e8e-9f53-7b1d2a90c4e6"
REFUSING = "0d8a5a4e-93a5-4d59-a3e7-8f6f1f5b7c02"
WRITES = WAIT_FOR_COMPLETION | HOST_WRITES
GUARD = 0xA5


def pattern(seed: int, size: int) -> bytes:
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(size)


def digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def text(op: str, **members: object) -> bytes:
    return json.dumps({"op": op, **members}).encode()


def ask(channel: Channel, op: str, ranges=(), *, writes: bool = False, **members) -> dict:
    """One request and its answer."""
    answer = channel.request(text(op, **members), ranges, host_writes=writes)
    return json.loads(answer.rstrip(b"\0"))


def obedient(send_pages: int = 16, receive_pages: int = 16) -> Channel:
    return Channel.of_class(OBEDIENT, send_pages=send_pages, receive_pages=receive_pages)


@contextlib.contextmanager
def fails(*numbers: int) -> Iterator[None]:
    """What is inside must end with this error, or one of these."""
    found = "no error"
    try:
        yield
    except OSError as error:
        if error.errno in numbers:
            return
        found = repr(error)
    raise AssertionError(f"{found} instead of {[errno.errorcode[n] for n in numbers]}")


def there_and_back(channel: Channel, pages: int, pinned: int = 0) -> None:
    """Data goes out, and comes back turned round, byte for byte; *pinned* pages stay so."""
    memory = Memory(pages * PAGE)
    data = pattern(pages, pages * PAGE)
    memory[:] = data
    answer = ask(channel, "digest", [memory.range()])
    assert answer["sha256"] == digest(data)
    assert answer["ranges"] == [[pages * PAGE, 0, pages]]
    answer = ask(channel, "flip", [memory.range()], writes=True)
    assert answer["sha256"] == digest(data)
    assert memory[:] == data[::-1]
    assert channel.info.pinned_pages == pinned


def in_child(work: Callable[[], None]) -> int:
    """Run *work* in a child; its pid. It exits 0 if *work* returns."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def hold_some(channel: Channel, memory: Memory, count: int = 64, **members: object) -> None:
    """Packets that the device keeps. With ``forgotten=True`` it does so even at the end."""
    for key in range(count):
        channel.send(text("hold", key=key, **members), [memory.range()], flags=WRITES)
