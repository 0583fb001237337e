# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtio-net header: each field where the standard has it, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostvmbus.devices.net.link import PLAIN, Gso, Offload, vnet

WORD = st.integers(0, 0xFFFF)
OFFLOADS = st.builds(
    Offload,
    needs_checksum=st.booleans(),
    checksum_valid=st.booleans(),
    start=WORD,
    offset=WORD,
    header_length=WORD,
) | st.builds(
    Offload,
    needs_checksum=st.just(True),
    start=WORD,
    offset=WORD,
    gso=st.sampled_from([Gso.TCPV4, Gso.TCPV6]),
    segment_size=st.integers(1, 0xFFFF),
    header_length=WORD,
)


def test_every_field_in_its_place() -> None:
    offload = Offload(
        needs_checksum=True,
        start=0x1122,
        offset=0x3344,
        gso=Gso.TCPV6,
        segment_size=0x5566,
        header_length=0x7788,
    )
    assert vnet.pack(offload) == bytes.fromhex("01 04 8877 6655 2211 4433")
    assert vnet.pack(PLAIN) == vnet.pack(Offload()) == bytes(vnet.SIZE)
    assert vnet.pack(Offload(checksum_valid=True)) == b"\x02" + bytes(9)


@given(OFFLOADS)
def test_there_and_back(offload: Offload) -> None:
    packed = vnet.pack(offload)
    assert len(packed) == vnet.SIZE
    assert vnet.unpack(packed) == offload
    assert vnet.unpack(bytearray(packed)) == offload


@given(st.binary(min_size=vnet.SIZE, max_size=vnet.SIZE))
def test_any_bytes_are_understood_or_refused(header: bytes) -> None:
    if header[1] in tuple(Gso):
        assert vnet.unpack(header).segment_size == header[4] + 256 * header[5]
    else:
        with pytest.raises(vnet.BadHeader):
            vnet.unpack(header)


@pytest.mark.parametrize(
    "offload",
    [
        Offload(needs_checksum=True, start=0x10000),
        Offload(needs_checksum=True, offset=-1),
        Offload(gso=Gso.TCPV4, segment_size=1460),
        Offload(needs_checksum=True, gso=Gso.TCPV4),
        Offload(needs_checksum=True, gso=Gso.TCPV4, segment_size=0x10000),
    ],
)
def test_nonsense_is_not_sent(offload: Offload) -> None:
    with pytest.raises(vnet.BadHeader):
        vnet.pack(offload)
