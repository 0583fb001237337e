# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads who imports whom, and the law about it, which is the tables of docs/architecture.md.

The document is the only place where the law is written: what its tables do not allow is forbidden.
Everything works on any tree, so that the tests can show that it fails when it should.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

PACKAGE = "vhostvmbus"
KINDS = (".py", ".pyi", ".c", ".h")
DOCUMENT = Path("docs", "architecture.md")
ALL_BELOW = "all below"
NOTHING = "nothing"
LONGEST = 500
"""Lines that a file may have without saying why."""
WHY_LONG = "This file is long because"
LONG = "to be long"
WITH_LONG_FILES = ("vhostvmbus", "qemu/src", "guest-images")
"""Where files are looked at for their length."""


class LawUnclear(Exception):
    """The document cannot be read."""


@dataclass(frozen=True)
class Row:
    """A room's row in the table of floors; ``devices/*`` stands for every folder of ``devices``."""

    floor: int
    room: str
    imports: tuple[str, ...]
    """Rooms that it may import; :data:`ALL_BELOW` alone for every lower floor."""


@dataclass(frozen=True)
class Pardon:
    """A row in the table of exceptions: a room or a file, and what it is allowed."""

    who: str
    what: str
    """A room or a file that it may import; :data:`LONG`."""
    reason: str

    def __str__(self) -> str:
        what = LONG if self.what == LONG else f"to import `{self.what}`"
        return f"{DOCUMENT}: `{self.who}` is allowed {what}"


@dataclass(frozen=True)
class Arrow:
    """One import or include: ``source`` and ``target`` are files, from the tree's root."""

    source: Path
    line: int
    target: Path
    text: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.text}"


@dataclass
class Law:
    """What the document says."""

    rows: list[Row]
    beside: dict[str, str]
    """Files beside the rooms, and the room whose law each one is under."""
    pardons: list[Pardon]

    @cached_property
    def by_room(self) -> dict[str, Row]:
        return {row.room: row for row in self.rows}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _names(cell: str) -> list[str]:
    """Returns what stands in backticks; nothing but commas may stand between."""
    if re.sub(r"`[^`]+`", "", cell).strip(", "):
        raise LawUnclear(
            f"{DOCUMENT}: cannot read {cell!r}: names in backticks, commas between them"
        )
    return re.findall(r"`([^`]+)`", cell)


def tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Returns each table of ``text``: the cells of its head, and those of its rows."""
    table: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            table.append(_cells(line))
        elif table:
            yield table[0], table[2:]
            table = []


def _table(text: str, *head: str) -> list[list[str]]:
    """Returns the rows of the one table whose head begins with ``head``."""
    found = [rows for cells, rows in tables(text) if tuple(cells[: len(head)]) == head]
    if len(found) != 1:
        raise LawUnclear(f"{DOCUMENT}: {len(found)} tables begin with {' | '.join(head)}, not one")
    return found[0]


def read_law(text: str) -> Law:
    """Returns the law that the document ``text`` states. Raises :exc:`LawUnclear`."""
    rows = []
    for floor, room, imports, *_ in _table(text, "floor", "room", "may import"):
        if not floor.isdecimal():
            raise LawUnclear(f"{DOCUMENT}: {floor!r} is no floor")
        plain = {ALL_BELOW: [ALL_BELOW], NOTHING: []}
        names = plain[imports] if imports in plain else _names(imports)
        for name in _names(room):
            rows.append(Row(int(floor), name, tuple(names)))
    beside = {}
    for file, room in _table(text, "beside the rooms", "counts as"):
        (name,) = _names(file)
        beside[name] = "" if room == NOTHING else _names(room)[0]
    pardons = []
    for who, what, reason in _table(text, "who", "is allowed", "reason"):
        allowed = [LONG] if what == LONG else _names(what.removeprefix("to import "))
        pardons += [Pardon(name, each, reason) for name in _names(who) for each in allowed]
    return Law(rows, beside, pardons)


def _static_text(node: ast.expr) -> str:
    """Returns what of a string expression is known before it runs: its beginning."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@dataclass
class House:
    """The tree as it is, and what of it breaks its law."""

    tree: Path
    law: Law = field(init=False)

    def __post_init__(self) -> None:
        self.law = read_law((self.tree / DOCUMENT).read_text())

    @property
    def package(self) -> Path:
        return self.tree / PACKAGE

    @cached_property
    def files(self) -> list[Path]:
        """The product's Python and C, as paths from the tree's root."""
        found = sorted(path for path in self.package.rglob("*") if path.suffix in KINDS)
        return [path.relative_to(self.tree) for path in found]

    @cached_property
    def modules(self) -> dict[str, Path]:
        """The Python files by their dotted names."""
        found = {}
        for path in self.files:
            if path.suffix in (".py", ".pyi"):
                parts = path.with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        return found

    def room_of(self, path: Path) -> str:
        """Returns the room that a file of the package is in; "" for one that counts as none."""
        parts = path.parts[1:]
        if len(parts) == 1:
            return self.law.beside.get(path.stem, path.name)
        deep = 2 if f"{parts[0]}/*" in self.law.by_room and len(parts) > 2 else 1
        return "/".join(parts[:deep])

    def row_of(self, room: str) -> Row | None:
        """Returns the row of the table that a room is under."""
        rows = self.law.by_room
        return rows.get(room) or rows.get(f"{room.partition('/')[0]}/*")

    @cached_property
    def arrows(self) -> list[Arrow]:
        """Every import and every include of the product that stays inside it."""
        found: list[Arrow] = []
        for path in self.files:
            found += self._imports(path) if path.suffix[:3] == ".py" else self._includes(path)
        return found

    def _imports(self, path: Path) -> Iterator[Arrow]:
        """Returns the imports of a file, those in functions and under TYPE_CHECKING too."""
        dotted = path.with_suffix("").parts
        for node in ast.walk(ast.parse((self.tree / path).read_text(), str(path))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ".".join([*dotted[: len(dotted) - node.level], *filter(None, [node.module])])
                origin = base if node.level else node.module or ""
                names = [f"{origin}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call) and node.args:
                called = ast.unparse(node.func).rpartition(".")[2]
                if called in ("import_module", "__import__"):
                    names = [_static_text(node.args[0])]
            for name in names:
                if name.split(".")[0] == PACKAGE:
                    target = self._file_of(name)
                    yield Arrow(path, node.lineno, target, f"imports {name.rstrip('.')}")

    def _file_of(self, name: str) -> Path:
        """Returns the file that ``name`` is in, the longest part of it that is a module."""
        parts = name.split(".")
        for end in range(len(parts), 1, -1):
            if found := self.modules.get(".".join(parts[:end])):
                return found
        if len(parts) > 1 and (parts[1] in self.law.beside or (self.package / parts[1]).is_dir()):
            return Path(PACKAGE, parts[1])
        return self.modules.get(PACKAGE, Path(PACKAGE, "__init__.py"))

    def _includes(self, path: Path) -> Iterator[Arrow]:
        for line, text in enumerate((self.tree / path).read_text().splitlines(), 1):
            if found := re.match(r'\s*#\s*include\s*"([^"]+)"', text):
                yield Arrow(path, line, self._header(path, found[1]), f"includes {found[1]}")

    def _header(self, path: Path, name: str) -> Path:
        """Returns the header that ``name`` means in ``path``: beside it, or the one of that name.

        The build puts every folder with C on the compiler's path.
        """
        beside = path.parent / name
        if beside in self.files:
            return beside
        found = [
            file for file in self.files if file.parts[-len(Path(name).parts) :] == Path(name).parts
        ]
        return found[0] if len(found) == 1 else Path(name)

    # What breaks the law: sentences that say where, and what to do.

    def _pardoned(self, arrow: Arrow) -> list[Pardon]:
        def meant(name: str, path: Path) -> bool:
            return name in (self.room_of(path), path.relative_to(PACKAGE).as_posix())

        return [
            pardon
            for pardon in self.law.pardons
            if meant(pardon.who, arrow.source)
            and arrow.target.parts[0] == PACKAGE
            and meant(pardon.what, arrow.target)
        ]

    @cached_property
    def judged(self) -> list[Arrow]:
        """The arrows that no exception takes out."""
        return [arrow for arrow in self.arrows if not self._pardoned(arrow)]

    def wrong_rows(self) -> Iterator[str]:
        """Rows of the table that contradict it, and rooms without a row or without a folder."""
        for row in self.law.rows:
            for name in row.imports:
                other = self.row_of(name)
                if name != ALL_BELOW and (other is None or other.floor >= row.floor):
                    yield (
                        f"{DOCUMENT}: `{row.room}` may import `{name}`, which is no room of a "
                        f"lower floor: a room imports from below only"
                    )
            folder = self.package / row.room.removesuffix("/*")
            if not folder.is_dir():
                yield (
                    f"{DOCUMENT}: the table names the room `{row.room}`, and there is no folder "
                    f"{folder.relative_to(self.tree)}: take the row out, or make the room"
                )
        if len(self.law.by_room) != len(self.law.rows):
            yield f"{DOCUMENT}: a room has two rows"
        seen = set()
        for path in self.files:
            room = self.room_of(path)
            if room and room not in seen and self.row_of(room) is None and len(path.parts) > 2:
                seen.add(room)
                yield (
                    f"{path}: the table of {DOCUMENT} does not name the room `{room}`: give it a "
                    f"row, with its floor and what it may import, or put the file into a room"
                )
            if len(path.parts) == 2 and path.stem not in self.law.beside:
                yield (
                    f"{path}: stands beside the rooms, and {DOCUMENT} does not say which one it "
                    f"counts as: put it into a room"
                )

    def forbidden(self, arrows: Iterable[Arrow] | None = None) -> Iterator[str]:
        """Imports and includes that the table does not allow."""
        for arrow in self.judged if arrows is None else arrows:
            if arrow.target.parts[0] != PACKAGE:
                yield f"{arrow}: no header of the product, or several, have this name"
                continue
            here, there = self.room_of(arrow.source), self.room_of(arrow.target)
            mine, other = self.row_of(here), self.row_of(there)
            if here == there or not there:
                continue
            if not here:
                yield f"{arrow}: a file that counts as no room may import nothing"
            elif mine is None or other is None:
                continue  # the table lacks the room: see wrong_rows
            elif other.floor > mine.floor:
                yield (
                    f"{arrow}: upward, from `{here}` on floor {mine.floor} to `{there}` on floor "
                    f"{other.floor}. Move what both need to a room below, or have the room above "
                    f"hand it in"
                )
            elif other.floor == mine.floor:
                yield (
                    f"{arrow}: from `{here}` to `{there}`, which is on the same floor. Move what "
                    f"both need to a room below"
                )
            elif ALL_BELOW not in mine.imports and other.room not in mine.imports:
                yield (
                    f"{arrow}: `{there}` is not among what `{here}` may import. If `{here}` ought "
                    f"to know it, say so in its row of {DOCUMENT}"
                )

    def circles(self, arrows: Iterable[Arrow] | None = None) -> Iterator[str]:
        """Files that import each other, and rooms that do, in whatever language."""
        arrows = list(self.judged if arrows is None else arrows)
        for kind in ("file", "room"):
            graph: dict[str, dict[str, Arrow]] = defaultdict(dict)
            for arrow in arrows:
                if arrow.target.parts[0] != PACKAGE:
                    continue
                ends = [str(arrow.source), str(arrow.target)]
                if kind == "room":
                    ends = [self.room_of(arrow.source), self.room_of(arrow.target)]
                if all(ends) and (kind == "file" or ends[0] != ends[1]):
                    graph[ends[0]].setdefault(ends[1], arrow)
            for way in _circles(graph):
                yield "\n  ".join(
                    [
                        f"a circle of {len(way)} {kind}s: take out one of these, by moving what "
                        f"both ends need to a {kind} of its own",
                        *map(str, way),
                    ]
                )

    def long_files(self) -> Iterator[str]:
        """Files with more than :data:`LONGEST` lines that do not say why in their head."""
        pardoned = {pardon.who for pardon in self.law.pardons if pardon.what == LONG}
        for folder in WITH_LONG_FILES:
            yield from self._long_files(folder, pardoned)

    def _long_files(self, folder: str, pardoned: set[str]) -> Iterator[str]:
        for full in sorted((self.tree / folder).rglob("*")):
            if full.suffix not in KINDS:
                continue
            path, text = full.relative_to(self.tree), full.read_text()
            lines = text.count("\n")
            if lines <= LONGEST or path.relative_to(path.parts[0]).as_posix() in pardoned:
                continue
            if WHY_LONG not in " ".join(_head(text).split()):
                yield (
                    f"{path}: {lines} lines, more than {LONGEST}. Split it by what it does, or say "
                    f'in its head: "{WHY_LONG} ..."'
                )

    def idle_pardons(self) -> Iterator[str]:
        """Exceptions that nothing needs any more, or without a reason."""
        for pardon in self.law.pardons:
            if len(pardon.reason) < 20:
                yield f"{pardon}, and the reason is missing"
            if pardon.what == LONG:
                path = self.package / pardon.who
                needed = path.is_file() and path.read_text().count("\n") > LONGEST
            else:
                mine = [arrow for arrow in self.arrows if self._pardoned(arrow) == [pardon]]
                needed = bool(mine) and (
                    any(self.forbidden(mine))
                    or set(self.circles([*self.judged, *mine])) != set(self.circles())
                )
            if not needed:
                yield f"{pardon}, and nothing needs that any more: take the row out"

    def broken(self) -> list[str]:
        """Returns everything that breaks the law."""
        return [
            *self.wrong_rows(),
            *self.forbidden(),
            *self.circles(),
            *self.long_files(),
            *self.idle_pardons(),
        ]


def _head(text: str) -> str:
    """Returns what stands before a file's code: its first comments and its docstring."""
    found = re.match(r'(\s*("""[\s\S]*?"""|/\*[\s\S]*?\*/|(//|#(?!include))[^\n]*\n))*', text)
    assert found
    return re.sub(r"\n\s*([*#]|//)", "\n", found[0])


def _circles(graph: dict[str, dict[str, Arrow]]) -> Iterator[list[Arrow]]:
    """Returns circles of ``graph``, one for each knot of nodes that reach each other."""
    done: set[str] = set()
    for start in sorted(graph):
        if start in done:
            continue
        came_by: dict[str, tuple[str, Arrow]] = {}
        queue = [start]
        for node in queue:
            for after, arrow in sorted(graph.get(node, {}).items()):
                if after == start:
                    way = [arrow]
                    while node != start:
                        done.add(node)
                        node, arrow = came_by[node]
                        way.append(arrow)
                    yield way[::-1]
                    queue = []
                    break
                if after not in came_by and after not in done:
                    came_by[after] = node, arrow
                    queue.append(after)
            else:
                continue
            break
        done.add(start)
