# SPDX-License-Identifier: GPL-2.0-or-later
"""Every message that there is, sent to a card over its channel: what completes it, whose mistake it
is, and that the conversation goes on."""

from __future__ import annotations

import struct

import pytest

from tests.support.net_card import MAC, ethernet, rig
from tests.support.waiting import eventually
from vhostvmbus.devices.net import nvsp, rndis
from vhostvmbus.guest.netvsc import VERSIONS

V1, V2, V4, V5, V6, V61 = reversed(VERSIONS)
NSTAT_FAIL = 2
NOT_SUPPORTED = 0xC00000BB
ANSWERS: dict[int, tuple[bytes, bytes, bool]] = {
    1: (struct.pack("<II", V61, V61), struct.pack("<4I", 2, 0, 0x22, NSTAT_FAIL), True),
    2: (b"", b"", True),
    100: (struct.pack("<II", 6, 30), b"", False),
    101: (struct.pack("<IH", 1, 1), struct.pack("<II", 102, NSTAT_FAIL), True),
    102: (b"", b"", True),
    103: (struct.pack("<H", 0xCAFE), b"", False),
    104: (struct.pack("<IH", 1, 1), struct.pack("<II", 105, NSTAT_FAIL), True),
    105: (b"", b"", True),
    106: (struct.pack("<H", 0), b"", False),
    107: (struct.pack("<III", 0, 0xFFFFFFFF, 0), struct.pack("<I", 108), True),
    108: (struct.pack("<I", 1), b"", True),
    125: (struct.pack("<IIQ", 1514, 0, 8), b"", True),
    128: (struct.pack("<II", 1, 7), b"", True),
    129: (struct.pack("<I", 1), b"", True),
    130: (struct.pack("<B", 1), b"", True),
    131: (struct.pack("<I", 20), struct.pack("<III", 132, NOT_SUPPORTED, 0), False),
    132: (b"", b"", True),
    133: (struct.pack("<II", 1, 1), struct.pack("<III", 133, NSTAT_FAIL, 0), False),
    134: (struct.pack("<II", 16, 12), b"", True),
    135: (struct.pack("<I", 3), struct.pack("<III", 135, 3, NOT_SUPPORTED), False),
}
"""By type: what is sent once all is set up, how its completion begins, and whether it is a
mistake then. The card has one channel."""


def test_all_are_here() -> None:
    assert set(ANSWERS) == set(nvsp.MessageType)


@pytest.mark.parametrize("kind", ANSWERS)
def test_nvsp(kind: int) -> None:
    body, answer, mistake = ANSWERS[kind]
    with rig() as r:
        r.driver.initialize()
        assert r.driver.nvsp(kind, body).startswith(answer)
        errors = r.card.stats()["errors"]
        assert sum(errors.values()) == mistake, errors
        if kind == 103:  # the receive buffer is taken back
            assert r.driver.lend_receive_buffer()
        assert r.driver.request(8, b"") == (0, b"")
        r.link.put(ethernet(bytes(60), to=MAC))
        assert r.driver.receive().data == ethernet(bytes(60), to=MAC)


@pytest.mark.parametrize("version", [V1, V2, V4, V5, V6, V61])
def test_what_a_version_does_not_have(version: int) -> None:
    """It is completed all the same, as a mistake."""
    later = {125: V2, 129: V4, 131: V5, 133: V5, 135: V6}
    with rig() as r:
        r.driver.initialize(versions=[version])
        for kind in (kind for kind, since in later.items() if version < since):
            before = r.card.stats()["errors"].get("NvspError", 0)
            r.driver.nvsp(kind, ANSWERS[kind][0])
            assert r.card.stats()["errors"]["NvspError"] == before + 1, kind
        assert r.driver.request(8, b"") == (0, b"")


def test_the_data_path_may_stay_where_it_is() -> None:
    with rig() as r:
        r.driver.initialize()
        assert r.driver.nvsp(129, struct.pack("<I", 0)) == b""
        assert r.card.stats()["errors"] == {}


def test_rndis() -> None:
    """Each type that a guest may send, and those that it may not."""
    with rig() as r:
        r.driver.initialize()
        assert {kind.name for kind in rndis.MessageType} == {
            "PACKET", "INITIALIZE", "HALT", "QUERY", "SET", "RESET", "INDICATE_STATUS", "KEEPALIVE",
        }  # fmt: skip
        status, body = r.driver.request(2, struct.pack("<III", 1, 0, 0x4000))
        assert (status, len(body)) == (0, 36)
        assert r.driver.query(0x01010101) == MAC
        assert r.driver.set(0x0001010E, struct.pack("<I", 1)) == 0
        assert r.driver.request(8, b"") == (0, b"")
        assert r.driver.send_control(struct.pack("<III", 6, 12, 0)) == 1
        assert r.driver.answer(0)[0] == 0
        for kind in (1, 7, 0x80000002, 9):  # not for the control channel; the host's; answers; none
            r.driver.send_control(struct.pack("<III", kind, 12, 5))
        eventually(lambda: r.card.stats()["errors"] == {"RndisError": 4})
        assert r.driver.send_control(struct.pack("<III", 3, 12, 1)) == 1
        assert r.driver.request(8, b"")[0] != 0  # not initialized any more
        assert r.driver.request(2, struct.pack("<III", 1, 0, 0x4000))[0] == 0


def test_every_oid_of_the_supported_list() -> None:
    """Each can be queried, or set: those that tell the card something."""
    protocol_options, config_parameter = 0x00010112, 0x0001021B
    network_layer_addresses, link_parameters = 0x00010118, 0x00010208
    offload_parameters, set_power = 0xFC01020C, 0xFD010101
    with rig() as r:
        r.driver.initialize()
        data = r.driver.query(0x00010101)
        supported = struct.unpack(f"<{len(data) // 4}I", data)
        assert len(set(supported)) == len(supported) > 30
        refused = {oid for oid in supported if r.driver.try_query(oid)[0] == NOT_SUPPORTED}
        assert refused == {
            protocol_options, config_parameter, offload_parameters, set_power,
            network_layer_addresses, link_parameters,
        }  # fmt: skip
        assert NOT_SUPPORTED not in {r.driver.set(oid, bytes(3)) for oid in refused}
