# SPDX-License-Identifier: GPL-2.0-or-later
"""A device's author imports from ``vhostvmbus.device``, and for tests from ``vhostvmbus.guest``.

The documents and the examples do so; both have all that their own words name; nothing is there
without a line in docs/writing-a-device.md.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import EXAMPLES, PROGRAMS, TREE
from vhostvmbus import device, guest

FACES = {"vhostvmbus.device", "vhostvmbus.guest"}
DOCUMENT = TREE / "docs" / "writing-a-device.md"
DEVICES = [
    *sorted(EXAMPLES.glob("*.py")),
    TREE / "tests" / "support" / "devices.py",
    TREE / "tests" / "support" / "inflight_devices.py",
    PROGRAMS / "kmcl_devices.py",
]
TEXTS = [*sorted(TREE.glob("*.md")), *sorted((TREE / "docs").rglob("*.md"))]
USED = {
    "vhostvmbus.channel": ["Channel", "ChannelState"],
    "vhostvmbus.device": ["Device", "DeviceHost", "Offer", "RefuseOpen", "wait_until_quiet"],
    "vhostvmbus.memory": ["CodeMap", "ExternalData"],
    "vhostvmbus.packet": ["Packet"],
    "vhostvmbus.ring": ["Number", "Operation", "Plan", "Rule"],
    "vhostvmbus.wire.errors": ["ChannelClosed", "OfferRefused", "PacketError", "RefuseOpen"],
    "vhostvmbus.wire.ntstatus": ["NtStatus"],
    "vhostvmbus.wire.vmbus": ["PAGE_SIZE", "ChannelFlag", "PacketType"],
}
"""What devices imported, and from where, before there was one place for it."""


def imports(code: str) -> Iterator[tuple[str, str]]:
    """Returns the module and the name of each import of ours in ``code``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def ours(code: str) -> list[tuple[str, str]]:
    return [found for found in imports(code) if found[0].partition(".")[0] == "vhostvmbus"]


def snippets() -> list[tuple[str, str]]:
    """Returns every piece of Python in the documents, with where it is."""
    return [
        (f"{path.relative_to(TREE)}#{number}", code)
        for path in TEXTS
        for number, code in enumerate(
            re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
        )
    ]


@pytest.mark.parametrize("path", DEVICES, ids=lambda path: path.name)
def test_a_device_imports_from_the_public_face_alone(path: Path) -> None:
    found = {module for module, _ in ours(path.read_text())}
    assert found <= FACES
    assert found


@pytest.mark.parametrize(("where", "code"), snippets(), ids=lambda text: text.partition("\n")[0])
def test_a_document_imports_from_the_public_face_alone(where: str, code: str) -> None:
    """Or from a device that comes with the package, which its own document shows."""
    for module, name in ours(code):
        assert module in FACES or re.match(r"vhostvmbus\.devices\.\w+", module), where
        assert hasattr(importlib.import_module(module), name) or importlib.import_module(
            f"{module}.{name}"
        )


def test_there_are_documents_with_python() -> None:
    assert {where.partition("#")[0] for where, _ in snippets()} >= {
        "README.md",
        "docs/writing-a-device.md",
        "docs/devices/scsi.md",
    }


@pytest.mark.parametrize("path", [TREE / "README.md", DOCUMENT], ids=lambda path: path.name)
def test_a_document_for_authors_names_no_other_module(path: Path) -> None:
    named = set(re.findall(r"\bvhostvmbus(?:\.[a-z_]\w*)+", path.read_text()))
    assert named <= FACES


@pytest.mark.parametrize("face", [device, guest], ids=lambda face: face.__name__)
def test_every_name_has_a_line_and_a_docstring(face: ModuleType) -> None:
    text = DOCUMENT.read_text()
    _, found, table = text.partition(f"| from `{face.__name__}` | |\n|---|---|\n")
    assert found
    rows = table.partition("\n\n")[0].splitlines()
    first_cells = " ".join(row.split("|")[1] for row in rows)
    listed = re.findall(r"`(\w+)`", first_cells)
    # An error stands in the line of its base.
    errors = {
        name for name in face.__all__ if f"`{name}`" in " ".join(rows) and is_error(face, name)
    }
    assert sorted({*listed, *errors}) == sorted(face.__all__)
    assert len(listed) == len(set(listed))
    for name in face.__all__:
        value = getattr(face, name)
        assert isinstance(value, int) or inspect.getdoc(value), name


def is_error(face: ModuleType, name: str) -> bool:
    value = getattr(face, name)
    return isinstance(value, type) and issubclass(value, Exception)


def words_of(kind: type) -> Iterator[tuple[str, str]]:
    """Returns the names of ours that a class's public docstrings and annotations use."""
    members = [(kind.__name__, kind)] + [
        (f"{kind.__name__}.{name}", member)
        for name, member in vars(kind).items()
        if not name.startswith("_") or name == "__init__"
    ]
    for where, member in members:
        member = member.fget if isinstance(member, property) else member
        member = getattr(member, "__func__", member)
        text = inspect.getdoc(member) if callable(member) else ""
        for name in re.findall(r":(?:exc|class):`~?(?:[\w.]+\.)?([A-Z]\w+)`", text or ""):
            yield where, name
        if inspect.isfunction(member) and not where.endswith("__init__"):
            for annotation in member.__annotations__.values():
                for name in re.findall(r"\b[A-Z]\w+", str(annotation)):
                    yield where, name


@pytest.mark.parametrize(
    ("face", "also", "kinds"),
    [
        (device, [], ["Device", "Channel", "Packet", "ExternalData", "Plan", "Rule"]),
        (
            guest,
            device.__all__,
            ["SoftwareGuest", "GuestChannel", "GuestRam", "HostPacket", "Transaction"],
        ),
    ],
    ids=["device", "guest"],
)
def test_all_that_the_classes_speak_of_is_there(
    face: ModuleType, also: list[str], kinds: list[str]
) -> None:
    inside = {"serve_with", "offers"}  # what drives a device calls
    named = {
        (where, name)
        for kind in kinds
        for where, name in words_of(getattr(face, kind))
        if is_ours(name) and where.split(".")[-1] not in inside
    }
    assert not {(where, name) for where, name in named if name not in {*face.__all__, *also}}
    assert len(named) > 20


def is_ours(name: str) -> bool:
    """Whether a class of the product has this name."""
    return name in CLASSES


CLASSES = {
    node.name
    for path in (TREE / "vhostvmbus").rglob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef)
}


@pytest.mark.parametrize("module", USED)
def test_where_devices_imported_from_before_still_works(module: str) -> None:
    for name in USED[module]:
        assert getattr(importlib.import_module(module), name) is getattr(device, name)
