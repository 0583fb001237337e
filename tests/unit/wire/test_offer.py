# SPDX-License-Identifier: GPL-2.0-or-later
"""The offer: its bytes, and what none may hold."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostvmbus.wire.offer import Offer, OfferInvalid

CLASS_ID = UUID("a0a0a0a0-1111-2222-3333-444444444444")
U16 = st.integers(0, 0xFFFF)


def test_the_offer_is_what_the_specification_says() -> None:
    offer = Offer(CLASS_ID, UUID(int=1), 0x2000, 3, channels=2, max_channels=5, user_defined=b"me")
    data = offer.pack()
    assert len(data) == 160
    assert data[0:16] == CLASS_ID.bytes_le
    assert data[16:32] == UUID(int=1).bytes_le
    assert data[32:40] == bytes([0x00, 0x20, 3, 0, 2, 0, 5, 0])
    assert data[40:] == b"me".ljust(120, b"\0")
    assert Offer(CLASS_ID).pack()[16:32] == bytes(16)


@given(st.uuids(), st.uuids(), U16, U16, st.tuples(U16, U16), st.binary(max_size=120))
def test_an_offer_comes_back_as_it_was_packed(
    class_id: UUID,
    instance_id: UUID,
    flags: int,
    megabytes: int,
    channels: tuple[int, int],
    user_defined: bytes,
) -> None:
    first, most = sorted(max(1, count) for count in channels)
    offer = Offer(class_id, instance_id, flags, megabytes, first, most, user_defined)
    assert Offer.parse(offer.pack()) == offer


def test_the_same_offer_is_equal_however_it_is_written() -> None:
    padded = Offer(CLASS_ID, UUID(int=0), user_defined=b"me".ljust(120, b"\0"))
    assert padded == Offer(CLASS_ID, user_defined=b"me")
    assert padded.instance_id is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channel_flags", -1),
        ("channel_flags", 0x10000),
        ("mmio_megabytes", -1),
        ("mmio_megabytes", 65536),
        ("channels", 0),
        ("channels", 65536),
        ("max_channels", 1),
        ("max_channels", 65536),
        ("user_defined", bytes(121)),
    ],
)
def test_the_field_that_is_out_of_its_range_is_named(field: str, value: object) -> None:
    good: dict[str, object] = {"channels": 2, "max_channels": 3}
    with pytest.raises(OfferInvalid, match=field) as caught:
        Offer(CLASS_ID, **(good | {field: value}))  # type: ignore[arg-type]
    assert (caught.value.field, caught.value.value) == (field, value)


@pytest.mark.parametrize(("offset", "field"), [(36, "channels"), (38, "max_channels")])
def test_an_offer_that_means_nothing_is_refused(offset: int, field: str) -> None:
    data = bytearray(Offer(CLASS_ID).pack())
    data[offset : offset + 2] = bytes(2)
    with pytest.raises(OfferInvalid) as caught:
        Offer.parse(bytes(data))
    assert caught.value.field == field
