# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/kmcl.md: every function has a row, every row code and tests that exist, or a reason."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from functools import cache
from typing import NamedTuple

import pytest

from tests.support.paths import PROGRAMS, TREE

DOCUMENT = TREE / "docs" / "kmcl.md"

FUNCTIONS = [
    "VmbChannelAllocate",
    "VmbChannelCleanup",
    "VmbChannelEnable",
    "VmbChannelDisable",
    "VmbChannelStart",
    "VmbChannelPause",
    "VmbChannelInitSetFlags",
    "VmbServerChannelInitSetFlags",
    "VmbChannelInitSetMaximumPacketSize",
    "VmbChannelInitSetMaximumExternalData",
    "VmbChannelInitSetProcessPacketCallbacks",
    "VmbChannelInitSetStateChangeCallbacks",
    "VmbChannelInitSetClientContextSize",
    "VmbPacketSetPointer",
    "VmbPacketGetPointer",
    "VmbChannelSetPointer",
    "VmbChannelGetPointer",
    "VmbChannelInitSetFriendlyName",
    "VmbChannelSetTransactionQuota",
    "VmbChannelSetIncomingProcessingAtPassive",
    "VmbChannelPacketDeferToPassive",
    "VmbChannelSetInterruptLatency",
    "VmbChannelGetInterfaceInstance",
    "VmbServerChannelInitSetTargetInterfaceId",
    "VmbServerChannelInitSetMmioMegabytes",
    "VmbChannelGetMmioSpace",
    "VmbServerChannelInitSetTargetVtl",
    "VmbServerChannelInitSetVmbusHandle",
    "VmbConvertVmbusHandleToKernelHandle",
    "VmbClientChannelInitSetRingBufferPageCount",
    "VmbClientChannelInitSetTargetPnp",
    "VmbPacketAllocate",
    "VmbPacketFree",
    "VmbPacketInitialize",
    "VmbChannelSizeofPacket",
    "VmbPacketSetCompletionRoutine",
    "VmbPacketSend",
    "VmbPacketSendWithExternalMdl",
    "VmbPacketSendWithExternalPfns",
    "VmbPacketGetChannel",
    "VmbChannelSendSynchronousRequest",
    "VmbChannelPacketComplete",
    "VmbChannelPacketFail",
    "VmbChannelPacketGetExternalData",
    "VmbChannelCreateGpadlFromBuffer",
    "VmbChannelCreateGpadlFromMdl",
    "VmbChannelDeleteGpadl",
    "VmbChannelMapGpadl",
    "VmbChannelUnmapGpadl",
    "VmbChannelSaveBegin",
    "VmbChannelSaveContinue",
    "VmbChannelSaveEnd",
    "VmbChannelRestoreFromBuffer",
    "VmbServerChannelInitSetSaveRestorePacketCallbacks",
    "VmbPacketRestore",
]


class Row(NamedTuple):
    names: list[str]
    code: str
    tests: str
    remark: str


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows() -> list[Row]:
    found = []
    for line in DOCUMENT.read_text().splitlines():
        parts = cells(line)
        if line.startswith("| Vmb") and len(parts) == 5:
            found.append(Row(re.findall(r"Vmb\w+", parts[0]), *parts[2:]))
    return found


def references() -> list[str]:
    """Everything in backticks in the tables that is code or a test."""
    text = "\n".join(li for li in DOCUMENT.read_text().splitlines() if li.startswith("|"))
    return sorted(set(re.findall(r"`([\w/]+::\w+)`", text)))


def code_references() -> list[str]:
    return sorted(
        {name for row in rows() for name in re.findall(r"`([a-z_]+[.][\w.]+)`", row.code)}
    )


@cache
def functions_in(name: str) -> frozenset[str]:
    """Returns the test functions of the file that ``name`` stands for: ``unit/ring/plan``."""
    folder, _, file = name.rpartition("/")
    path = TREE / "tests" / folder / f"test_{file}.py"
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def exists(name: str) -> bool:
    """Whether ``vhostvmbus.<name>`` is a module, a class, a function, or an attribute."""
    parts = ["vhostvmbus", *name.split(".")]
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for position, part in enumerate(parts[split:], split):
            if hasattr(found, part):
                found = getattr(found, part)
            else:
                is_last = position == len(parts) - 1
                return (
                    is_last
                    and inspect.isclass(found)
                    and re.search(rf"^\s+(self\.)?{part}\b.*[:=]", inspect.getsource(found), re.M)
                    is not None
                )
        return True
    return False


def test_every_function_has_one_row() -> None:
    named = [name for row in rows() for name in row.names]
    assert sorted(named) == sorted(FUNCTIONS)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.names[0])
def test_a_row_has_code_and_tests_or_a_reason(row: Row) -> None:
    if row.code == "none":
        assert row.tests == "none"
        assert row.remark.startswith(("no counterpart: ", "not there"))
        assert len(row.remark) > 40
    else:
        assert re.search(r"`[a-z_]+[.][\w.]+`", row.code)
        assert "::" in row.tests or row.tests == "below"


@pytest.mark.parametrize("name", code_references())
def test_code_exists(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize("reference", references())
def test_a_test_exists(reference: str) -> None:
    file, name = reference.split("::")
    assert f"test_{name}" in functions_in(file)


def test_the_cases_in_a_real_guest_are_those_that_exist() -> None:
    """All of them are in the table, and nothing else is; and the functions are KMCL's."""
    programs = sorted(PROGRAMS.glob("kmcl_*.py"))
    existing = {
        node.name
        for path in programs
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
    }
    table = [line for line in DOCUMENT.read_text().splitlines() if "`case_" in line]
    assert set(re.findall(r"`(case_\w+)`", "\n".join(table))) == existing
    for line in table:
        named = set(re.findall(r"Vmb\w+", cells(line)[0]))
        assert named
        assert named <= set(FUNCTIONS)


def test_what_does_not_exist_is_noticed() -> None:
    """These tests can fail."""
    for name in ("channel.Channel.paws", "channel.Packet.chanel", "nothing.Here", "device.Gadget"):
        assert not exists(name)
    assert "test_nothing" not in functions_in("unit/channel/channel")
    assert len(code_references()) > 40
    assert len(references()) > 60
