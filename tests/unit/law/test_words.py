# SPDX-License-Identifier: GPL-2.0-or-later
"""Holds the docstrings to CONTRIBUTING.md, *Docstrings*, as far as a program can tell."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest

from tests.support.paths import TREE

FOLDERS = ("vhostvmbus", "benchmarks")
OTHER_FIRST_WORDS = {"Called", "See"}
"""How a callback's docstring begins, and one that leaves the words to another place."""
NO_VERBS = {"Always", "As", "Bytes", "Frames", "Is", "Its", "Packets", "Seconds", "This"}
QUESTIONS = {"What", "Where", "Whether", "Who", "Why"}
SINGLE_BACKTICK = re.compile(r"(?<![`:\w])`[^`\n]+`(?!`)")


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, int, str]]:
    """Yields what each string that stands by itself belongs to, with its line and text.

    That is a module, class or function whose docstring it is, or an assignment above it.
    """
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for above, statement in zip([node, *body], body, strict=False):
            match statement:
                case ast.Expr(ast.Constant(str(text))):
                    yield above, statement.lineno, text


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tells whether a function is a property, a cached one too."""
    return any(
        ast.unparse(decorator).endswith(("property", ".setter"))
        for decorator in function.decorator_list
    )


def begins_well(owner: ast.AST, text: str) -> bool:
    """Tells whether the first word is one that CONTRIBUTING.md allows there."""
    word = text.split()[0].rstrip(",.:;") if text.split() else ""
    if isinstance(owner, (ast.FunctionDef, ast.AsyncFunctionDef)):
        if is_property(owner):
            return word not in QUESTIONS
        verb = re.fullmatch("[A-Z][a-z]+s", word) and word not in NO_VERBS
        return bool(verb) or word in OTHER_FIRST_WORDS
    return word not in QUESTIONS and not word.startswith(".") and not text.startswith("So long")


def mistakes(text: str) -> list[str]:
    """Returns what is wrong with a module's docstrings and comments, by line."""
    found = []
    for owner, line, string in docstrings(ast.parse(text)):
        if not begins_well(owner, string):
            found.append(f"{line}: begins with {string.split()[:3]}")
        if SINGLE_BACKTICK.search(string):
            found.append(f"{line}: single backticks")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.string.startswith("#:"):
            found.append(f"{token.start[0]}: the string of an attribute stands below it")
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_are_in_one_dialect(folder: str) -> None:
    files = sorted((TREE / folder).rglob("*.py"))
    assert files
    assert [
        f"{path.relative_to(TREE)}:{mistake}"
        for path in files
        for mistake in mistakes(path.read_text())
    ] == []


GOOD = '''"""A module."""

LIMIT = 1
"""The most packets, as in ``limits``."""


class Quota:
    """A bound, see :class:`Limits`."""

    @property
    def now(self) -> int:
        """The packets that may come now."""

    @property
    def paused(self) -> bool:
        """Tells whether none may come."""

    def wait(self) -> None:
        """Waits."""

    def ended(self) -> None:
        """Called when the channel has ended."""
'''


def test_good_docstrings_pass() -> None:
    assert mistakes(GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("Waits.", "Wait until it is over.", 19),
        ("Waits.", "The end of it.", 19),
        ("Waits.", "Whether it has.", 19),
        ("Waits.", "Bytes that are left.", 19),
        ("Waits.", "", 19),
        ("Tells whether none", "Whether none", 16),
        ("The packets that", "What", 12),
        ("The most packets", "Whether packets", 4),
        ("The most packets", "So long packets", 4),
        ("A module", "What a module", 1),
        ("``limits``", "`limits`", 4),
        ("A bound", "A `bound`", 8),
        ("LIMIT = 1\n", "#: The most packets.\nLIMIT = 1\n", 3),
        ("LIMIT = 1\n", "LIMIT = 1  #: The most packets.\n", 3),
    ],
)
def test_a_mistake_is_found(old: str, new: str, line: int) -> None:
    assert GOOD.count(old) == 1
    (found,) = mistakes(GOOD.replace(old, new))
    assert found.startswith(f"{line}:")
