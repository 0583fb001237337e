# SPDX-License-Identifier: GPL-2.0-or-later
"""One back end, and front ends without number that break the protocol: it stays as it was.

They pass descriptors of every kind, lie about memory, scribble over rings, send half a message or
none that there is, and leave in the middle.
"""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest

from tests.liveness.play import Player
from tests.liveness.process import Nursery, scratch
from tests.liveness.rig import Finding, Late
from tests.liveness.run import LATE, PATIENCE
from tests.liveness.steps import make_broken_session
from tests.support.footprint import Repeated, Subject
from tests.support.soak import SOAK, times

SESSIONS = times(2, 1000)
MEMORY = 1
"""MiB by which the process may have grown."""


@pytest.mark.parametrize("device", ["plain", "planned disk"])
def test_sessions_of_a_broken_peer(nursery: Nursery, repeated: Repeated, device: str) -> None:
    """Each has a guest of its own; a good front end is served after each."""
    first = random.SystemRandom().randrange(1 << 31) if SOAK else 0
    config = {"device": device, "unplug": [], "patience": PATIENCE}
    with scratch() as name, contextlib.ExitStack() as stack:
        owner = Player(nursery, Path(name), config)
        stack.callback(owner.close)
        owner.warm_up()
        subject = Subject("the back end", lambda: owner.child.pid, MEMORY, owner.pool)
        for turn in repeated(f"sessions of a broken peer, {device}", SESSIONS, subject):
            for _ in range(LATE):  # after which it is not the machine that is
                player = Player(nursery, Path(name), config, owner.child)
                try:
                    player.play_session(make_broken_session(first + turn, device))
                    break
                except Finding as finding:
                    log = owner.child.log.read_text()
                    trouble = "\n".join([f"seed {first + turn}: {finding}", *player.story, log])
                    if not isinstance(finding, Late):
                        pytest.fail(trouble)
                finally:
                    player.close_guest()
            else:
                pytest.fail(trouble)
        assert owner.child.tell("deaths") == []
