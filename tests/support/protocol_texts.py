# SPDX-License-Identifier: GPL-2.0-or-later
"""The numbers of the protocol as its three texts have them, for comparing the texts.

The texts are QEMU's C (``VUV_*`` of the header, ``PF_*`` of the connection), Python's
``message.py`` with the layouts of the messages, and the tables of ``docs/vhost-user-vmbus.md``.
Each is read from a string, so that a test can change one and see that it is found out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from vhostvmbus.guest.offers import MOST_WAITING
from vhostvmbus.guest.software_guest import UNPLUG_TIMEOUT
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.backchannel import ANSWER_TIMEOUT
from vhostvmbus.vhost_user.limits import ConnectionLimits
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.regions import MAX_REGIONS
from vhostvmbus.wire.vmbus import USER_DATA_SIZE

Numbers = dict[str, int]


@dataclass
class Text:
    """The words of one text, by the names of the document."""

    requests: Numbers = field(default_factory=dict)
    backend_requests: Numbers = field(default_factory=dict)
    feature_bits: Numbers = field(default_factory=dict)
    """The numbers of bits, not masks; the feature bit among them is ``F_PROTOCOL_FEATURES``."""
    required: Numbers = field(default_factory=dict)
    """The bits that no session can do without."""
    limits: Numbers = field(default_factory=dict)
    flags: Numbers = field(default_factory=dict)
    statuses: Numbers = field(default_factory=dict)
    sizes: Numbers = field(default_factory=dict)
    """The bytes of a payload, or of its fixed part."""


def differences(one: Text, other: Text) -> list[str]:
    """Returns each entry that the two do not have alike, as ``kind.name: one, other``."""
    found = []
    for kind in fields(Text):
        mine, theirs = getattr(one, kind.name), getattr(other, kind.name)
        for name in sorted({*mine, *theirs}):
            if mine.get(name) != theirs.get(name):
                found.append(f"{kind.name}.{name}: {mine.get(name)}, {theirs.get(name)}")
    return found


# -- QEMU ----------------------------------------------------------------------------------------

_C_NAMES = {"MAX_INVALIDATIONS": "MAX_INVALIDATE_RANGES"}
_C_SIZES = {"VuvOffer": "offer", "VuvInflightDesc": "in-flight region"}


def of_qemu(header: str, connection: str) -> Text:
    """Reads every number that the C gives a name with the prefixes ``VUV_`` and ``PF_``."""
    text = Text()
    for name, number in re.findall(r"^ {4}VUV_(\w+) = (\w+),", header, re.M):
        value = int(number, 0)
        if name.startswith("STATUS_"):
            text.statuses[name.removeprefix("STATUS_")] = value
        elif name.startswith("BACKEND_"):
            text.backend_requests[f"VMBUS_{name}"] = value
        else:
            text.requests[f"VMBUS_{name}" if value >= 1024 else name] = value
    for name, number in re.findall(r"^#define VUV_(\w+) +(\w+)$", header, re.M):
        if name.endswith("_MS"):
            text.limits[name.removesuffix("_MS")] = int(number, 0) // 1000
        elif name.startswith("OPEN_"):
            text.flags[name.removeprefix("OPEN_")] = int(number, 0)
        else:
            text.limits[_C_NAMES.get(name, name)] = int(number, 0)
    bits = r"^#define (?:PF_)?(\w+) +\(1ull << (\d+)\)$"
    text.feature_bits = {name: int(bit) for name, bit in re.findall(bits, connection, re.M)}
    for name, number in re.findall(r"^QEMU_BUILD_BUG_ON\(sizeof\((\w+)\) != (\d+)\)", header, re.M):
        text.sizes[_C_SIZES[name]] = int(number)
    return text


# -- Python --------------------------------------------------------------------------------------


def of_python(message: str) -> Text:
    """Runs the text of ``message.py``; limits and layouts of other files are those in force."""
    # A name that exists, for dataclasses look there; the registries are this run's own.
    names: dict[str, object] = {"__name__": m.Message.__module__}
    exec(compile(message, "message.py", "exec"), names)
    text = Text()
    text.requests = _members(names["Request"])
    text.backend_requests = _members(names["BackendRequest"])
    text.feature_bits = {
        name: mask.bit_length() - 1 for name, mask in _members(names["ProtocolFeature"]).items()
    }
    required = names["REQUIRED_FEATURES"]
    text.required = {
        name: bit
        for name, bit in text.feature_bits.items()
        if isinstance(required, int) and required >> bit & 1
    }
    for name, value in names.items():
        if not isinstance(value, int) or name == "REQUIRED_FEATURES":
            continue
        if name.startswith("F_"):
            text.feature_bits[name] = value.bit_length() - 1
        elif name.startswith("OPEN_"):
            text.flags[name.removeprefix("OPEN_")] = value
        else:
            text.limits[name] = value
    text.limits |= {
        "MAX_REGIONS": MAX_REGIONS,
        "USER_DATA_SIZE": USER_DATA_SIZE,
        "ANSWER_TIMEOUT": round(ANSWER_TIMEOUT),
        "UNPLUG_TIMEOUT": round(UNPLUG_TIMEOUT),
        "MAX_GPADL_LIST": ConnectionLimits().gpadl_list_bytes,
        "MAX_CODE_MAP": ConnectionLimits().code_map_bytes,
        "MAX_CHANGES": MOST_WAITING,
    }
    text.statuses = {status.name: status.value for status in NtStatus}
    registered = [(m.Request, m.FRONT_END_REQUESTS), (m.BackendRequest, m.BACK_END_REQUESTS)]
    for numbers, registry in registered:
        for number, kind in registry.items():
            name = numbers(number).name
            if name.startswith("VMBUS_"):
                text.sizes[name] = kind.LAYOUT.size
    text.sizes |= {
        "offer": m.OfferReply.LAYOUT.size,
        "in-flight region": m.InflightReply.LAYOUT.size,
        "memory region": m.MemoryRegion.LAYOUT.size,
    }
    return text


def _members(enumeration: object) -> Numbers:
    assert isinstance(enumeration, type)
    return {name: int(value) for name, value in enumeration.__members__.items()}


# -- the document --------------------------------------------------------------------------------

_UNITS = {"bytes": 1, "seconds": 1, "MiB": 1 << 20, "GiB": 1 << 30, "": 1}
NOTHING = "\N{EN DASH}"
_WIDTHS = {"u16": 2, "u32": 4, "u64": 8}


def of_document(document: str) -> Text:
    """Reads the tables, and the layouts and flags that stand in the text."""
    text = Text()
    for heading, header, row in _rows(document):
        name = row[0].strip("`")
        if header[:2] == ["request", "id"]:
            kind = text.backend_requests if heading == "Back-end requests" else text.requests
            kind[name] = int(row[1])
            if "payload" in header:
                text.sizes[name] = _payload_size(document, row[2])
        elif header[:2] == ["bit", "name"]:
            text.feature_bits[row[1].strip("`")] = int(row[0])
            if "**required**" in row[2]:
                text.required[row[1].strip("`")] = int(row[0])
        elif header[0] == "limit":
            number, _, unit = row[1].partition(" ")
            text.limits[name] = int(number) * _UNITS[unit]
        elif heading == "VMBUS_GET_OFFER":
            assert int(row[0]) == text.sizes.get("offer", 0), f"{row[1]} is not at {row[0]}"
            text.sizes["offer"] = int(row[0]) + _width(row[1])
    (bit,) = re.findall(r"VHOST_USER_F_(PROTOCOL_FEATURES)` \(bit (\d+)\)", document)
    text.feature_bits["F_PROTOCOL_FEATURES"] = int(bit[1])
    for number, name in re.findall(r"`flags` bit (\d+), `(\w+)`", document):
        text.flags[name] = 1 << int(number)
    for name, status in re.findall(r"STATUS_(\w+)\s+\(`(0x[0-9A-F]{8})`\)", document):
        text.statuses[name] = int(status, 0)
    said, layout = _one(r"send, (\d+) bytes: `([^`]*)`", document)
    text.sizes["in-flight region"] = _sum(layout, int(said))
    (layout,) = re.findall(r"Each region is `([^`]*)`", document)
    text.sizes["memory region"] = _sum(layout)
    (said,) = re.findall(r"^Reply, (\d+) bytes:$", document, re.M)
    assert text.sizes["offer"] == int(said), "the offer's fields are not its size"
    return text


def _rows(document: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yields the rows of all tables, each with the heading above it and the header of its table."""
    heading, header = "", list[str]()
    for line in document.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            header = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not header:
            header = cells
        elif set(line) - set("|- "):
            yield heading, header, cells


def _payload_size(document: str, cell: str) -> int:
    """Returns the bytes of a payload as the tables have it: fields, none, or a section's name."""
    if cell == NOTHING:
        return 0
    if cell == "open":
        said, layout = _one(r"^(\d+) bytes: `([^`]*)`", document)
        return _sum(layout, int(said))
    if cell == "code map":
        (layout,) = re.findall(r"^### VMBUS_SET_CODE_MAP\n`([^`]*)`", document, re.M)
        return _sum(layout)
    (layout, *_) = re.findall(r"`([^`]*)`", cell)
    return _sum(layout)


def _one(pattern: str, document: str) -> tuple[str, str]:
    (found,) = re.findall(pattern, document, re.M)
    return found[0], found[1]


def _sum(layout: str, said: int | None = None) -> int:
    size = sum(_width(item) for item in layout.replace("\n", " ").split(","))
    assert said in (None, size), f"{layout} are {size} bytes, not {said}"
    return size


def _width(item: str) -> int:
    """Returns the bytes of ``name u32``, ``name[120]`` or ``name 16 bytes``."""
    (kind,) = re.findall(r"u16|u32|u64|\[\d+\]|\d+ bytes", item)
    return _WIDTHS.get(kind) or int(re.sub(r"\D", "", kind))
