# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's C, Python's messages and the document say the same of the protocol."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

from tests.support.paths import TREE
from tests.support.protocol_texts import (
    Numbers,
    Text,
    differences,
    of_document,
    of_python,
    of_qemu,
)

HEADER = "qemu/src/include/hw/hyperv/vhost-user-vmbus.h"
CONNECTION = "qemu/src/hw/hyperv/vhost-user-vmbus-conn.c"
MESSAGE = "vhostvmbus/vhost_user/message.py"
DOCUMENT = "docs/vhost-user-vmbus.md"

NOT_IN_QEMU = {
    "requests": {"SET_MEM_TABLE"},
    "feature_bits": {"LOG_SHMFD", "BACKEND_SEND_FD", "DEVICE_STATE"},
    "limits": {"MAX_TABLE_REGIONS", "USER_DATA_SIZE", "MAX_GPADL_LIST", "MAX_CODE_MAP"},
}
"""Names that QEMU does not have: it neither sends nor offers them, or leaves them to the back end.

Nor does it say in one place what is required; and it asserts two sizes alone.
"""
NOT_IN_PYTHON = {"limits": {"MAX_CHANNELS"}}
"""Limits of a front end, which the software guest chooses."""


@dataclass(frozen=True)
class Texts:
    """The contents of the files, changed or not."""

    header: str
    connection: str
    message: str
    document: str

    @classmethod
    def of_the_tree(cls) -> Texts:
        return cls(*((TREE / name).read_text() for name in (HEADER, CONNECTION, MESSAGE, DOCUMENT)))

    def disagreements(self) -> list[str]:
        """Everything in which the document differs from QEMU's C or from Python."""
        document, python = of_document(self.document), of_python(self.message)
        qemu = of_qemu(self.header, self.connection)
        # Python has a name for every status; the other two for those that they speak of.
        found = [
            f"statuses.{name}: {number:#x}, {python.statuses.get(name)}"
            for text in (document, qemu)
            for name, number in text.statuses.items()
            if number != python.statuses.get(name)
        ]
        found += differences(
            replace(without(document, NOT_IN_PYTHON), statuses={}), replace(python, statuses={})
        )
        asserted = {name: document.sizes[name] for name in qemu.sizes}
        c_has = replace(without(document, NOT_IN_QEMU), statuses={}, required={}, sizes=asserted)
        return found + differences(c_has, replace(qemu, statuses={}))


def without(text: Text, names: dict[str, set[str]]) -> Text:
    """The text less some entries, which it has to have."""
    kept: dict[str, Numbers] = {}
    for kind in fields(Text):
        numbers, left_out = getattr(text, kind.name), names.get(kind.name, set())
        assert left_out <= set(numbers), f"exceptions that are none: {left_out - set(numbers)}"
        kept[kind.name] = {name: number for name, number in numbers.items() if name not in left_out}
    return Text(**kept)


TEXTS = Texts.of_the_tree()


def test_the_three_texts_agree() -> None:
    assert TEXTS.disagreements() == []


def test_the_texts_are_read_at_all() -> None:
    """A parser that finds nothing would find no difference."""
    document, python = of_document(TEXTS.document), of_python(TEXTS.message)
    qemu = of_qemu(TEXTS.header, TEXTS.connection)
    for text in (document, python, qemu):
        assert text.requests["VMBUS_OPEN"] == 1027
        assert text.requests["GET_FEATURES"] == 1
        assert text.backend_requests["VMBUS_BACKEND_RESCIND_CHANNEL"] == 1026
        assert text.feature_bits["VMBUS"] == 48
        assert text.feature_bits["F_PROTOCOL_FEATURES"] == 30
        assert text.limits["MAX_INVALIDATE_RANGES"] == 200
        assert text.flags == {"RESUME": 1}
        assert text.statuses["NOT_SUPPORTED"] == 0xC00000BB
        assert text.sizes["offer"] == 160
        assert text.sizes["in-flight region"] == 24
    assert python.sizes["VMBUS_OPEN"] == document.sizes["VMBUS_OPEN"] == 144
    assert set(python.required) == {"REPLY_ACK", "BACKEND_REQ", "CONFIGURE_MEM_SLOTS", "VMBUS"}


CHANGES = [
    # a number that is another one
    ("header", "VUV_CLOSE = 1028", "VUV_CLOSE = 1033", "requests.VMBUS_CLOSE"),
    ("header", "VUV_REM_MEM_REG = 38", "VUV_REM_MEM_REG = 39", "requests.REM_MEM_REG"),
    ("header", "VUV_MAX_PAYLOAD         4096", "VUV_MAX_PAYLOAD 4097", "limits.MAX_PAYLOAD"),
    ("header", "TIMEOUT_MS   10000", "TIMEOUT_MS   9000", "limits.ANSWER_TIMEOUT"),
    ("header", "sizeof(VuvOffer) != 160", "sizeof(VuvOffer) != 164", "sizes.offer"),
    ("header", "VUV_OPEN_RESUME         1", "VUV_OPEN_RESUME 2", "flags.RESUME"),
    ("header", "0xc00000bb", "0xc00000bc", "statuses.NOT_SUPPORTED"),
    ("connection", "PF_VMBUS_UNPLUG         (1ull << 50)", "PF_VMBUS_UNPLUG (1ull << 51)", "bits."),
    ("message", "VMBUS_UNPLUG = 1032", "VMBUS_UNPLUG = 1033", "requests.VMBUS_UNPLUG"),
    ("message", "RANGES = 200", "RANGES = 250", "limits.MAX_INVALIDATE_RANGES"),
    ("message", "LOG_SHMFD = 1 << 1", "LOG_SHMFD = 1 << 2", "feature_bits.LOG_SHMFD"),
    ("message", "    | ProtocolFeature.VMBUS\n", "", "required.VMBUS"),
    ("message", "OPEN_RESUME = 1", "OPEN_RESUME = 2", "flags.RESUME"),
    ("document", "| `VMBUS_MODIFY` | 1029 |", "| `VMBUS_MODIFY` | 1030 |", "requests.VMBUS_MODIFY"),
    (
        "document",
        "| 49 | `VMBUS_CODE_MAP`",
        "| 59 | `VMBUS_CODE_MAP`",
        "feature_bits.VMBUS_CODE_MAP",
    ),
    ("document", "| `MAX_REGIONS` | 100 |", "| `MAX_REGIONS` | 101 |", "limits.MAX_REGIONS"),
    ("document", "`0xC000000D`", "`0xC000000E`", "statuses.INVALID_PARAMETER"),
    (
        "document",
        "| 3 | `REPLY_ACK` | **required** |",
        "| 3 | `REPLY_ACK` | optional |",
        "required.",
    ),
    (
        "document",
        "`channel u32, target_vp u32`",
        "`channel u32, target_vp u64`",
        "sizes.VMBUS_MODIFY",
    ),
    # an entry that the others have not
    ("header", "VUV_UNPLUG = 1032,", "VUV_UNPLUG = 1032,\n    VUV_SAVE = 1033,", "VMBUS_SAVE"),
    (
        "header",
        "#define VUV_OPEN_RESUME",
        "#define VUV_MAX_GUESTS 7\n#define VUV_OPEN_RESUME",
        "GUESTS",
    ),
    ("header", "VUV_BACKEND_OFFER_CHANNEL = 1025,\n", "", "VMBUS_BACKEND_OFFER_CHANNEL"),
    ("connection", "#define PF_VMBUS_CODE_MAP       (1ull << 49)\n", "", "VMBUS_CODE_MAP"),
    ("message", "    VMBUS_RESET = 1030\n", "", "requests.VMBUS_RESET"),
    ("message", "\nMAX_PAYLOAD", "\nMAX_GUESTS = 7\nMAX_PAYLOAD", "limits.MAX_GUESTS"),
    ("message", "DEVICE_STATE =", "GUEST_STATE = 1 << 30\n    DEVICE_STATE =", "GUEST_STATE"),
    ("document", "| `GET_MAX_MEM_SLOTS` | 36 | |\n", "", "requests.GET_MAX_MEM_SLOTS"),
    ("document", "| `MAX_CHANGES` | 4096 |", "| `MAX_GUESTS` | 4096 |", "limits.MAX_GUESTS"),
    ("document", "STATUS_IO_TIMEOUT (", "STATUS_TOO_LATE (", "statuses.TOO_LATE"),
    (
        "document",
        "`VMBUS_BACKEND_INVALIDATE_CODE` | 1024",
        "`VMBUS_BACKEND_DISCARD` | 1024",
        "DISCARD",
    ),
]


@pytest.mark.parametrize(("file", "old", "new", "where"), CHANGES)
def test_a_text_that_differs_is_found_out(file: str, old: str, new: str, where: str) -> None:
    before = getattr(TEXTS, file)
    assert old in before, "the test changes nothing"
    found = replace(TEXTS, **{file: before.replace(old, new)}).disagreements()
    assert any(where in line for line in found), found
