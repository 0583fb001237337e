# SPDX-License-Identifier: GPL-2.0-or-later
"""Benchmarks on a machine where nothing is cached: all is fetched in time, and where it can be.

The recipes and QEMU are stand-ins here, which write down the network namespace they ran in.
"""

import os
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import net_vm
from tests.support.network import namespaces, require_root
from vhostvmbus.vm import images
from vhostvmbus.vm.errors import SetupError

RECIPE = """\
#!/bin/sh
echo "$(readlink /proc/self/ns/net) ${{0##*/}} $*" >>{record}
{then}
"""
HERE = os.readlink("/proc/self/ns/net")


class Tree:
    """A project's tree whose recipes take no time, and what they were asked for."""

    def __init__(self, folder: Path, scripts: Path) -> None:
        self.folder = folder
        self.record = folder / "record"
        parts = folder / "parts"
        modules = parts / "kernel" / "lib" / "modules" / "6.0.0-stand-in"
        for made in (modules, parts / "module", parts / "busybox", parts / "root"):
            made.mkdir(parents=True)
        (modules / "modules.dep").touch()
        for name in ("kernel/vmlinuz", "busybox/busybox", "root/root.img"):
            (parts / name).write_bytes(bytes(1 << 20))
        (folder / "guest-images").mkdir()
        (folder / "guest-images" / "initramfs").symlink_to(scripts / "initramfs")
        (folder / "guest-images" / "root").symlink_to(scripts / "root")
        (folder / "qemu").mkdir()
        self.program("guest-images/build", f"echo {parts}/$1")
        self.program("qemu/build", f"echo {folder}/stand-in")
        self.program("stand-in", "exit 1")

    def program(self, name: str, then: str) -> None:
        path = self.folder / name
        path.write_text(RECIPE.format(record=self.record, then=then))
        path.chmod(0o755)

    @property
    def asked(self) -> list[list[str]]:
        """The namespace, the program's name and its words, of each that ran."""
        return [line.split() for line in self.record.read_text().splitlines()]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    tree = Tree(tmp_path, images.TREE / "guest-images")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VHOSTVMBUS_QEMU", raising=False)
    monkeypatch.setattr(images, "TREE", tree.folder)
    return tree


def test_nothing_is_fetched_from_within_a_namespace(tree: Tree) -> None:
    require_root()
    with pytest.raises(SetupError, match="QEMU did not start"):
        list(net_vm.tables(1.0))
    *recipes, (namespace, program, *_) = tree.asked
    assert program == "stand-in"
    assert namespace != HERE
    assert {(where, what) for where, what, *_ in recipes} == {(HERE, "build")}
    assert {words[0] for _, _, *words in recipes if words} == {
        "kernel",
        "module",
        "busybox",
        "root",
    }
    assert [] in [words for _, _, *words in recipes]  # QEMU's
    assert f"vhostvmbus-bench-{os.getpid()}" not in namespaces()


def test_what_is_missing_is_made_before_anything_is_measured(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tree.program("guest-images/build", "exit 1")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--seconds", "0.01", "codemap", "vm"])
    with pytest.raises(SystemExit, match=r"guest-images/build kernel 6\.1 failed"):
        command.main()
    assert capfd.readouterr().out == ""


def test_benchmarks_without_a_machine_need_nothing_built(
    tree: Tree, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--seconds", "0.01", "codemap"])
    command.main()
    assert "Translated code" in capfd.readouterr().out
    assert not tree.record.exists()
