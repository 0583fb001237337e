# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that lies to the network card: every mistake has a name and costs the guest only."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.net_card import EVERYTHING, MAC, HastyCard, Rig, ethernet, rig
from tests.support.soak import examples
from tests.support.waiting import eventually
from vhostvmbus.guest.netvsc import (
    CHECKSUM,
    LARGE_SEND,
    NO_SECTION,
    VLAN,
    element,
    packet_message,
)
from vhostvmbus.wire.gpa import GpaRange


@pytest.fixture
def r() -> Iterator[Rig]:
    with rig(capabilities=EVERYTHING) as found:
        found.driver.initialize()
        yield found


def rndis(section: int, size: int, channel: int = 0) -> bytes:
    return struct.pack("<IIII", 107, channel, section, size).ljust(40, b"\0")


def status_of(answer: bytes) -> tuple[int, int]:
    kind, status = struct.unpack_from("<II", answer)
    return kind, status


def well(r: Rig) -> None:
    """The card still serves, both ways."""
    assert r.driver.send(ethernet(b"well")).wait() == 1
    while r.link.get().frame != ethernet(b"well"):
        pass
    r.link.put(ethernet(b"well", to=MAC))
    while r.driver.receive().data != ethernet(b"well", to=MAC):
        pass


@pytest.mark.parametrize(
    ("section", "size", "channel", "error"),
    [
        (1 << 20, 100, 0, "SectionError"),
        (NO_SECTION - 1, 100, 0, "SectionError"),
        (0, (1 << 17) + 1, 0, "SectionError"),
        (41, 10241, 0, "SectionError"),
        (0, 0xFFFFFFFF, 0, "SectionError"),
        (NO_SECTION, 0, 0, "RndisError"),
        (0, 0, 0, "RndisError"),
        (0, 7, 0, "RndisError"),
        (0, 100, 2, "NvspError"),
        (0, 100, 0xFFFFFFFF, "NvspError"),
        (0, 3, 1, "RndisError"),
        (NO_SECTION, 0, 1, "RndisError"),
    ],
)
def test_sections_that_are_not_there(
    r: Rig, section: int, size: int, channel: int, error: str
) -> None:
    answer = r.channel.send(rndis(section, size, channel))
    assert status_of(answer)[0] == 108
    eventually(lambda: r.card.stats()["errors"] == {error: 1})
    well(r)


FRAME = ethernet(b"x" * 60)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (struct.pack("<II", 1, 0), "RndisError"),
        (struct.pack("<II", 1, 0xFFFFFFFF) + bytes(60), "RndisError"),
        (struct.pack("<II", 9, 100) + bytes(92), "RndisError"),
        (packet_message(FRAME) + b"\0", "RndisError"),
        (packet_message(FRAME)[:-1], "RndisError"),
        (packet_message(b"short"), "FrameError"),
        (packet_message(b""), "FrameError"),
        (packet_message(ethernet(bytes(1600))), "FrameError"),
        (packet_message(FRAME, bytes(16)), "PacketInfoError"),
        (packet_message(FRAME, element(VLAN, 1) * 2), "PacketInfoError"),
        (packet_message(FRAME, element(3, 1) * 80), "PacketInfoError"),
        (packet_message(FRAME, element(CHECKSUM, 0xFFFFFFFF)), "FrameError"),
        (packet_message(FRAME, element(LARGE_SEND, 0xFFFFFFFF)), "FrameError"),
        (packet_message(FRAME, element(LARGE_SEND, 0)), "FrameError"),
    ],
)
@pytest.mark.parametrize("paged", [False, True])
def test_messages_that_lie(r: Rig, message: bytes, error: str, paged: bool) -> None:
    good = packet_message(FRAME)
    both = [good, message]
    sending = r.driver._send(b"".join(both), None) if paged else r.driver.send_many(both)
    assert sending.wait() == 5
    assert r.link.get().frame == FRAME  # what came first was good
    assert r.card.stats()["errors"] == {error: 1}
    assert r.card.stats()["send_errors"] == 1
    well(r)


def test_too_many_messages(r: Rig) -> None:
    small = packet_message(ethernet(b""))
    assert r.driver.send_many([small] * 65).wait() == 5
    assert [r.link.get().frame for _ in range(64)] == [ethernet(b"")] * 64
    assert r.card.stats()["errors"] == {"RndisError": 1}
    well(r)


@pytest.mark.parametrize("frame_bytes", [0, 44, 60])
def test_the_message_ends_in_the_middle_of_its_header(r: Rig, frame_bytes: int) -> None:
    message = packet_message(FRAME, element(VLAN, 16))
    for cut in (1, 8, 43, 44, 50, 60, 61, 73):
        section, paged = message[:cut], message[cut : cut + frame_bytes]
        whole = len(section) + len(paged) >= len(message)
        assert r.driver.send_many([section], paged).wait() == (1 if whole else 5)
        if whole:
            assert r.link.get().frame[14:18] == b"\0\x01" + FRAME[12:14]
    well(r)


def test_pages_that_are_not_there(r: Rig) -> None:
    for ranges in (
        [GpaRange(100, 0, [1 << 40])],
        [GpaRange(4096 * 40, 0, [1] * 40)],
        [GpaRange(1, 0, [1])] * 65,
    ):
        transaction = r.channel.submit_with_external_ranges(rndis(NO_SECTION, 0), ranges)
        assert status_of(transaction.wait()) == (108, 5)
    errors = r.card.stats()["errors"]
    assert errors == {"PfnOutsideMemory": 1, "GpaRangeTooLong": 1, "GpaRangeCountInvalid": 1}
    answer = r.channel.submit_with_external_ranges(b"\x01\0\0\0", [GpaRange(1, 0, [1 << 40])])
    assert answer.wait() == b""
    well(r)


def test_gpadls_that_make_no_buffers() -> None:
    with rig() as r:
        assert r.driver.negotiate(0x60001)
        r.driver.configure()
        ring = next(iter(r.guest.gpadls))
        for kind in (101, 104):
            small = r.guest.create_gpadl(1)
            huge = r.guest.create_gpadl((31 << 20) // 4096 + 1)
            for handle in (0, 0xFFFFFFFF, small.gpadl_id, huge.gpadl_id):
                answer = r.driver.nvsp(kind, struct.pack("<IH", handle, 1))
                assert status_of(answer) == (kind + 1, 2)
            r.guest.delete_gpadl(small)
            r.guest.delete_gpadl(huge)
        assert r.card.stats()["errors"] == {"SectionError": 8}
        gpadl = r.guest.create_gpadl(64)
        body = struct.pack("<IH", gpadl.gpadl_id, 1)
        assert status_of(r.driver.nvsp(101, body)) == (102, 1)
        assert status_of(r.driver.nvsp(104, body)) == (105, 2)  # the same for both
        r.driver.nvsp(103, struct.pack("<H", 9))
        assert status_of(r.driver.nvsp(104, struct.pack("<IH", ring, 1)))[0] == 105
        assert status_of(r.driver.nvsp(101, body)) == (102, 1)


def test_gpadls_that_are_torn_down_while_they_are_lent(r: Rig) -> None:
    assert r.driver.receive_gpadl is not None
    assert r.driver.send_gpadl is not None
    r.guest.delete_gpadl(r.driver.receive_gpadl)
    r.guest.delete_gpadl(r.driver.send_gpadl)
    r.link.put(ethernet(to=MAC))
    eventually(lambda: r.card.stats()["receive_filtered"] == 1)
    assert status_of(r.channel.send(rndis(0, 100))) == (108, 5)
    assert r.card.stats()["errors"] == {"SectionError": 1}
    assert r.driver.send(ethernet(b"pages"), pages=True).wait() == 1
    assert r.link.get().frame == ethernet(b"pages")
    for receive, kind in ((True, 103), (False, 106)):
        r.driver.nvsp(kind, struct.pack("<H", 0))
        if receive:
            r.driver.lend_receive_buffer()
        else:
            r.driver.lend_send_buffer()
    well(r)


def test_everything_out_of_order() -> None:
    with rig() as r:
        for kind in (100, 101, 103, 104, 106, 107, 108, 125, 129, 131, 133, 135, 0, 2, 77):
            r.driver.nvsp(kind, struct.pack("<II", 1, 1))
        assert r.card.stats()["errors"] == {"NvspError": 15}
        for payload in (b"", b"\x01", b"\x01\0\0\0", bytes(200), bytes(400)):
            r.channel.send(payload)
        r.driver.initialize()
        assert r.driver.negotiate(0x60001) is False  # buffers are lent
        well(r)


def test_control_messages_that_lie(r: Rig) -> None:
    for message in (
        struct.pack("<II", 4, 8),
        struct.pack("<II", 4, 100) + bytes(20),
        struct.pack("<7I", 4, 28, 1, 0x10101, 100, 20, 0),
        struct.pack("<7I", 5, 28, 1, 0x1010E, 4, 0xFFFFFFF0, 0),
        struct.pack("<III", 0x80000004, 12, 1),
        struct.pack("<III", 1, 12, 1),
        struct.pack("<II", 4, 0x10000) + bytes(60000),
    ):
        assert r.driver.send_control(message) == 1  # the packet is fine, the message is not
    assert r.card.stats()["errors"] == {"RndisError": 7}
    well(r)


def test_halt_and_then_anything(r: Rig) -> None:
    assert r.driver.send_control(struct.pack("<III", 3, 12, 1)) == 1
    assert r.driver.try_query(0x01010101) == (0xC0010011, b"")
    r.link.put(ethernet(to=MAC))
    eventually(lambda: r.card.stats()["receive_filtered"] == 1)
    status, _ = r.driver.request(2, struct.pack("<III", 1, 0, 0x4000))
    assert status == 0
    assert r.driver.set(0x0001010E, struct.pack("<I", 0x0D)) == 0
    well(r)


def test_a_flood_of_garbage() -> None:
    """A thousand packets of noise, some of it plausible; then everything still works."""
    chance = random.Random(8)
    with rig() as r:
        r.driver.initialize()
        under_way = []
        for _ in range(1000):
            kind = chance.choice((100, 104, 107, 107, 107, 108, 125, 129, 131, 133, 135, 999))
            words = [chance.choice((0, 1, 2, 60, 0xFFFFFFFF, chance.getrandbits(32)))
                     for _ in range(9)]  # fmt: skip
            payload = struct.pack("<10I", kind, *words)[: chance.choice((4, 12, 16, 40, 40, 40))]
            under_way.append(r.channel.submit(payload))
            if len(under_way) == 50:
                for transaction in under_way:
                    transaction.wait()
                under_way.clear()
        errors = r.card.stats()["errors"]
        assert sum(errors.values()) > 300
        assert set(errors) <= {"NvspError", "SectionError", "RndisError", "FrameError"}
        assert r.channel.in_flight == 0
        well(r)


@settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(min_size=1, max_size=400), cut=st.integers(0, 400), head=st.booleans())
def test_any_bytes_as_messages(r: Rig, data: bytes, cut: int, head: bool) -> None:
    if head:
        data = struct.pack("<II", 1, len(data) + 8) + data
    section, paged = data[:cut], data[cut:]
    if section:
        assert r.driver.send_many([section], paged).wait() in (1, 5)
    else:
        assert r.driver._send(paged, None).wait() in (1, 5)
    r.link.world[0].setblocking(False)
    while True:
        try:
            r.link.get(timeout=0)
        except BlockingIOError:
            break


# -- guests that keep what is not theirs -----------------------------------------------------------


def test_a_guest_that_returns_nothing_starves_itself() -> None:
    with rig(kind=HastyCard, ring_pages=(17, 65)) as r:
        r.driver.initialize(receive_bytes=64 * 1728)
        count = r.driver.receive_sections
        r.driver.keep = True
        frames = [ethernet(struct.pack(">I", n), to=MAC) for n in range(count + 40)]
        for frame in frames:
            r.link.put(frame)
        got = [r.driver.receive().data for _ in range(count - 8)]
        assert got == frames[: len(got)]
        eventually(lambda: r.card.stats()["receive_no_buffer"] >= 40)
        assert r.card.stats()["receive_sections_free"] == 8
        assert r.driver.send(ethernet(b"still sends")).wait() == 1
        assert r.link.get().frame == ethernet(b"still sends")
        assert r.driver.query(0x01010101) == MAC
        kept, r.driver.kept, r.driver.keep = r.driver.kept, [], False
        for packet in kept:
            r.driver.give_back(packet)
        eventually(lambda: r.card.stats()["receive_sections_free"] == count)
        r.link.put(ethernet(b"again", to=MAC))
        assert r.driver.receive().data == ethernet(b"again", to=MAC)


def test_answers_wait_for_a_section_and_are_bounded() -> None:
    with rig(ring_pages=(17, 65)) as r:
        r.driver.initialize(receive_bytes=32 * 1728)
        r.driver.keep = True
        count = r.driver.receive_sections
        for number in range(count + 100):
            assert r.driver.send_control(struct.pack("<III", 8, 12, 5000 + number)) == 1
        for number in range(count):
            assert r.driver.answer(5000 + number) == (0, b"")
        assert r.card.stats()["control_dropped"] == 100 - 64
        kept, r.driver.kept, r.driver.keep = r.driver.kept, [], False
        for packet in kept:
            r.driver.give_back(packet)
        for number in range(64):
            assert r.driver.answer(5000 + count + number) == (0, b"")


def test_an_answer_waits_for_a_frames_section() -> None:
    """Also of a guest that wants no frames any more."""
    with rig(ring_pages=(17, 65)) as r:
        r.driver.initialize(receive_bytes=64 * 1728)
        r.driver.keep = True
        for _ in range(r.driver.receive_sections - 8):
            r.link.put(ethernet(to=MAC))
            r.driver.receive()
        frames = len(r.driver.kept)
        assert r.driver.set(0x0001010E, bytes(4)) == 0
        for number in range(8):
            assert r.driver.send_control(struct.pack("<III", 8, 12, 5000 + number)) == 1
        for number in range(7):
            assert r.driver.answer(5000 + number) == (0, b"")
        assert r.card.stats()["receive_sections_free"] == 0
        assert len(r.driver.kept) == frames + 8
        r.driver.give_back(r.driver.kept.pop(0))
        assert r.driver.answer(5007) == (0, b"")


def test_a_completion_that_is_none() -> None:
    with rig() as r:
        r.driver.initialize()
        r.driver.keep = True
        for payload in (b"\x6d\0\0", b"\x6c\0\0", struct.pack("<II", 107, 1)):
            r.link.put(ethernet(to=MAC))
            r.driver.receive()
            r.driver.kept.pop().complete(payload)
            assert r.driver.query(0x01010101) == MAC
            r.driver.kept.pop().complete(payload)
        eventually(lambda: r.card.stats()["receive_sections_free"] == r.driver.receive_sections)
        assert r.card.stats()["errors"] == {"ReturnError": 4}  # payloads are padded to 8 bytes


def test_a_completion_may_be_empty() -> None:
    """As iPXE has it: which packet is completed, it says."""
    with rig() as r:
        r.driver.initialize()
        r.driver.keep = True
        for _ in range(3):
            r.link.put(ethernet(to=MAC))
            r.driver.receive()
            assert r.driver.query(0x01010101) == MAC
        assert r.card.stats()["receive_sections_free"] == r.driver.receive_sections - 6
        for packet in r.driver.kept:
            packet.complete(b"")
        eventually(lambda: r.card.stats()["receive_sections_free"] == r.driver.receive_sections)
        assert r.card.stats()["errors"] == {}


def test_a_frequent_mistake_does_not_hide_another(r: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        r.channel.send(rndis(1 << 20, 100))
    r.channel.send(rndis(0, 100, 2))
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert 1 <= said.count("send_buf_section_index") < 20
    assert "channel_type" in said
