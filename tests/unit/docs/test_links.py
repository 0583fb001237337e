# SPDX-License-Identifier: GPL-2.0-or-later
"""Links between documents lead somewhere, and every document is on the list of documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import TREE

INDEX = TREE / "docs" / "README.md"
DOCUMENTS = [*sorted(TREE.glob("*.md")), *sorted((TREE / "docs").rglob("*.md"))]


def links(text: str) -> list[str]:
    """Returns where a document's links lead, those to other sites not counted."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", without_code)
    return [link for link in found if not re.match(r"\w+:", link)]


def anchors(text: str) -> set[str]:
    """Returns the names under which a document's headings are linked to."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}


def broken(path: Path) -> list[str]:
    """Returns the links of a document that lead nowhere."""
    found = []
    for link in links(path.read_text()):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(TREE)))
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_every_document_is_on_the_list() -> None:
    listed = {(INDEX.parent / link).resolve() for link in links(INDEX.read_text())}
    assert {*DOCUMENTS} - {INDEX, TREE / "README.md"} <= listed


def test_a_link_to_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A heading, *with* marks\n")
    document = tmp_path / "document.md"
    document.write_text(
        "[a](there.md) [b](there.md#a-heading-with-marks) [c](https://example.org/x)\n"
        "[d](gone.md) [e](there.md#gone) [f](#gone)\n```\n[g](code)\n```\n"
    )
    assert broken(document) == ["gone.md", "there.md#gone", "#gone"]
