# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/architecture.md is true: who imports whom, circles, long files. And this test can fail."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests.support.paths import TREE
from tests.unit.law.house import DOCUMENT, LONGEST, House, LawUnclear, read_law


@cache
def product() -> House:
    return House(TREE)


def test_rooms_have_rows_and_rows_have_rooms() -> None:
    assert not list(product().wrong_rows())


def test_no_import_and_no_include_is_forbidden() -> None:
    assert not list(product().forbidden())


def test_there_is_no_circle() -> None:
    assert not list(product().circles())


def test_no_file_is_long_without_a_reason() -> None:
    assert not list(product().long_files())


def test_every_exception_is_needed() -> None:
    assert not list(product().idle_pardons())


def test_everything_is_looked_at() -> None:
    """What a search for words finds is among what was read: no import, no include is missed."""
    seen = {(str(arrow.source), arrow.line) for arrow in product().arrows}
    missed = []
    for path in product().files:
        statement = (
            r"\s*(from|import)\s+vhostvmbus\b"
            if path.suffix.startswith(".py")
            else r'\s*#\s*include\s+"'
        )
        for line, text in enumerate((TREE / path).read_text().splitlines(), 1):
            if re.match(statement, text) and (str(path), line) not in seen:
                missed.append(f"{path}:{line}: {text}")
    assert not missed
    assert len(seen) > 400


def test_every_row_of_the_document_is_read() -> None:
    text = (TREE / DOCUMENT).read_text()
    law = read_law(text)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [line for line in lines if not re.match(r"\| ?-", line)]
    heads = ("| floor ", "| beside the rooms ", "| who ")
    assert [line for line in rows if line.startswith(heads)] == [
        line for line in rows if not re.match(r"\| (\d+|`)", line)
    ]
    names = {name for line in rows for name in re.findall(r"`([^`]+)`", line.split("|")[1])}
    assert names == {*law.beside, *(pardon.who for pardon in law.pardons)}
    assert sum(bool(re.match(r"\| \d", line)) for line in rows) == len(law.rows)


# What the law looks like in the trees that are made up below: three floors, and two devices.
FLOORS = """\
| floor | room | may import | what it knows |
|---|---|---|---|
| 3 | `roof` | all below | |
| 2 | `devices/*` | `ground` | |
| 1 | `middle`, `beside` | `ground` | |
| 0 | `ground` | nothing | |

| beside the rooms | counts as |
|---|---|
| `__init__` | nothing |
| `__main__` | `roof` |
| `_compiled` | `ground` |
"""
EXCEPTIONS = """
| who | is allowed | reason |
|---|---|---|
"""
ROOMS = ("roof", "middle", "beside", "ground", "devices/one", "devices/two")


def made_up(
    tree: Path, files: dict[str, str], floors: str = FLOORS, exceptions: str = ""
) -> list[str]:
    """Returns what breaks the law in a tree with these files in its package."""
    contents = {f"{room}/__init__.py": "" for room in ROOMS} | {"__init__.py": ""} | files
    for name, content in contents.items():
        path = tree / "vhostvmbus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tree / "docs").mkdir(parents=True)
    (tree / DOCUMENT).write_text(floors + EXCEPTIONS + exceptions)
    return House(tree).broken()


LAWFUL = {
    "__main__.py": "from vhostvmbus.roof import start\n",
    "roof/__init__.py": "from vhostvmbus.roof.start import start\n",
    "roof/start.py": "import importlib\nimport vhostvmbus\nfrom vhostvmbus import devices, middle\n"
    "def start(name):\n    importlib.import_module(f'vhostvmbus.devices.{name}.options')\n",
    "devices/__init__.py": "",
    "devices/one/card.py": "from vhostvmbus.ground import words\n",
    "devices/one/native/card.c": '#include <stdio.h>\n#include "card.h"\n',
    "devices/one/native/card.h": '#include "engine.h"\n',
    "ground/__init__.py": "from vhostvmbus._compiled import lib\n",
    "ground/words.py": "from .engine import x\nfrom . import engine\n",
    "ground/engine.py": "import os\n",
    "ground/engine.h": "",
}


def test_a_lawful_tree_passes(tmp_path: Path) -> None:
    assert made_up(tmp_path, LAWFUL) == []


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "ground/a.py",
            "from vhostvmbus.middle.b import c\n",
            "vhostvmbus/ground/a.py:1: imports vhostvmbus.middle.b.c: upward, "
            "from `ground` on floor 0 to `middle` on floor 1",
        ),
        ("ground/a.py", "import vhostvmbus.roof\n", "ground/a.py:1: imports vhostvmbus.roof: up"),
        ("ground/a.py", "from vhostvmbus import roof\n", "imports vhostvmbus.roof: upward"),
        ("ground/a.py", "from ..roof import x\n", "imports vhostvmbus.roof.x: upward"),
        ("ground/__init__.py", "from ..roof import x\n", "imports vhostvmbus.roof.x: upward"),
        ("ground/a.py", "def f():\n    import vhostvmbus.roof as r\n", "ground/a.py:2: imports"),
        (
            "ground/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vhostvmbus.roof\n",
            "ground/a.py:3: imports vhostvmbus.roof: upward",
        ),
        (
            "ground/a.py",
            "import importlib\nimportlib.import_module(f'vhostvmbus.devices.{1}.options')\n",
            "ground/a.py:2: imports vhostvmbus.devices: upward",
        ),
        ("ground/a.pyi", "import vhostvmbus.roof\n", "ground/a.pyi:1: imports vhostvmbus.roof: up"),
        (
            "middle/a.py",
            "import vhostvmbus.beside\n",
            "middle/a.py:1: imports vhostvmbus.beside: from `middle` to `beside`, "
            "which is on the same floor",
        ),
        (
            "devices/one/a.py",
            "import vhostvmbus.devices.two\n",
            "from `devices/one` to `devices/two`, which is on the same floor",
        ),
        (
            "devices/one/a.py",
            "import vhostvmbus.middle\n",
            "`middle` is not among what `devices/one` may import",
        ),
        (
            "middle/a.py",
            "import vhostvmbus.__main__\n",
            "upward, from `middle` on floor 1 to `roof`",
        ),
        ("__init__.py", "import vhostvmbus.ground\n", "counts as no room may import nothing"),
        (
            "cellar/a.py",
            "",
            "vhostvmbus/cellar/a.py: the table of docs/architecture.md does not name the room "
            "`cellar`: give it a row",
        ),
        ("stray.py", "", "vhostvmbus/stray.py: stands beside the rooms"),
        (
            "ground/a.c",
            '#include "one.h"\n',
            "vhostvmbus/ground/a.c:1: includes one.h: upward, from `ground` on floor 0 to "
            "`devices/one` on floor 2",
        ),
        ("ground/a.c", '#  include "gone.h"\n', "no header of the product, or several, have this"),
    ],
)
def test_what_the_table_forbids_is_found(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    (found,) = made_up(tmp_path, {"devices/one/native/one.h": "", file: text})
    assert message in found


def test_a_circle_of_files_is_found(tmp_path: Path) -> None:
    """Across packages of one room, though the types alone are imported one way."""
    (found,) = made_up(
        tmp_path,
        {
            "middle/__init__.py": "from vhostvmbus.middle.a import A\n",
            "middle/a.py": "import os\nfrom vhostvmbus.middle.b import B\n",
            "middle/b.py": "def f() -> None:\n    from vhostvmbus.middle import A\n",
        },
    )
    assert found.splitlines() == [
        "a circle of 3 files: take out one of these, by moving what both ends need to a file of "
        "its own",
        "  vhostvmbus/middle/__init__.py:1: imports vhostvmbus.middle.a.A",
        "  vhostvmbus/middle/a.py:2: imports vhostvmbus.middle.b.B",
        "  vhostvmbus/middle/b.py:2: imports vhostvmbus.middle.A",
    ]


def test_a_circle_of_rooms_in_two_languages_is_found(tmp_path: Path) -> None:
    """Neither of the arrows closes a circle of files."""
    found = made_up(
        tmp_path,
        {
            "middle/a.c": '#include "g.h"\n',
            "ground/g.h": "",
            "ground/h.c": '#include "m.h"\n',
            "middle/m.h": "",
        },
    )
    assert [text.splitlines()[0][:20] for text in found[1:]] == ["a circle of 2 rooms:"]
    assert "vhostvmbus/middle/a.c:1: includes g.h" in found[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("| 1 | `middle`", "| 1 | `attic`, `middle`", "no folder vhostvmbus/attic"),
        (
            "| `ground` | |\n| 0",
            "| `roof` | |\n| 0",
            "`middle` may import `roof`, which is no room",
        ),
        ("| `ground` | |\n| 0", "| `beside` | |\n| 0", "may import `beside`, which is no room"),
        ("| `ground` | |\n| 0", "| `nothing` | |\n| 0", "may import `nothing`, which is no room"),
        ("| 0 | `ground`", "| 0 | `ground`, `ground`", "a room has two rows"),
    ],
)
def test_a_table_that_contradicts_the_tree_or_itself_is_found(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in FLOORS
    found = made_up(tmp_path, {}, FLOORS.replace(old, new))
    assert message in found[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| floor |", "| storey |"),
        ("| 3 |", "| top |"),
        ("| `ground` | |\n| 1", "| ground | |\n| 1"),
        ("| `ground` | |\n| 1", "| `ground` and more | |\n| 1"),
        ("| beside the rooms |", "| besides |"),
    ],
)
def test_a_document_that_cannot_be_read_is_found(tmp_path: Path, old: str, new: str) -> None:
    assert old in FLOORS
    with pytest.raises(LawUnclear):
        made_up(tmp_path, {}, FLOORS.replace(old, new))


def test_a_long_file_is_found_unless_it_says_why(tmp_path: Path) -> None:
    code = "x = 1\n" * LONGEST
    why = '# SPDX\n"""Tables.\n\nThis file is\nlong because it is a table of many rows.\n"""\n'
    found = made_up(
        tmp_path,
        {
            "ground/a.py": "#\n" + code,
            "ground/b.py": code,
            "ground/c.py": why + code,
            "ground/d.py": code + why,
            "ground/e.c": "/* SPDX */\n/*\n * Tables.  This file is long because\n * it is.\n */\n"
            + "int x;\n" * LONGEST,
            "ground/f.h": "int x;\n" * (LONGEST + 1),
        },
    )
    assert [text.partition(":")[0] for text in found] == [
        "vhostvmbus/ground/a.py",
        "vhostvmbus/ground/d.py",
        "vhostvmbus/ground/f.h",
    ]


UPWARD = {"ground/a.py": "import vhostvmbus.roof\n"}
CIRCLE = {
    "ground/a.py": "import vhostvmbus.ground.b\n",
    "ground/b.py": "import vhostvmbus.ground.a\n",
}
LONG_FILE = {"ground/a.py": "x = 1\n" * (LONGEST + 1)}
REASON = "a good reason, which is a sentence"


@pytest.mark.parametrize(
    ("files", "row"),
    [
        (UPWARD, f"| `ground` | to import `roof` | {REASON} |"),
        (UPWARD, f"| `ground/a.py` | to import `roof/__init__.py` | {REASON} |"),
        (CIRCLE, f"| `ground/b.py` | to import `ground/a.py` | {REASON} |"),
        (LONG_FILE, f"| `ground/a.py` | to be long | {REASON} |"),
    ],
)
def test_an_exception_is_made_as_long_as_it_is_needed(
    tmp_path: Path, files: dict[str, str], row: str
) -> None:
    assert made_up(tmp_path / "needed", files, exceptions=row) == []
    (found,) = made_up(tmp_path / "idle", {"ground/a.py": ""}, exceptions=row)
    assert "nothing needs that any more: take the row out" in found
    (found,) = made_up(tmp_path / "bare", files, exceptions=row.replace(REASON, "so"))
    assert "the reason is missing" in found
