# SPDX-License-Identifier: GPL-2.0-or-later
"""A card that lets frames gather when they come in streams, and is prompt when they do not."""

from __future__ import annotations

from tests.support.net_card import Rig, ethernet, rig

FRAME = ethernet(bytes(100))


def counters(r: Rig) -> dict[str, int]:
    assert r.guest.host is not None
    found: dict[str, int] = r.guest.host.stats()["totals"]
    return found


def test_a_stream_is_let_gather() -> None:
    """Nothing is lost, and nothing late for ever."""
    with rig() as r:
        r.driver.initialize()
        for _ in range(40):
            sent = [r.driver.send(FRAME) for _ in range(20)]
            assert [one.wait() for one in sent] == [1] * 20
            assert [r.link.get().frame for _ in sent] == [FRAME] * 20
        assert r.card.stats()["send_refused"] == 0
        assert counters(r)["rests"] > 0


def rests_of_single_frames() -> int:
    with rig() as r:
        r.driver.initialize()
        for _ in range(300):
            assert r.driver.send(FRAME).wait() == 1
            r.link.get()
        return counters(r)["rests"]


def test_frames_one_by_one_are_not() -> None:
    """A rest that brought nothing is tried again after twice as many frames: 16, 32, 64, 128.

    On a busy machine the next frame may be there by chance, but not each time.
    """
    assert any(rests_of_single_frames() <= 5 for _ in range(10))
