# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices of the user's own, named by ``path.py:Class``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vhostvmbus.device import Device
from vhostvmbus.device.loading import LoadError, load_device

SOURCE = """
from uuid import UUID
from beside_the_device import NAME
from vhostvmbus.device import Device

class Thing(Device):
    class_id = UUID("7a7a7a7a-0001-0002-0003-000000000001")
    name = NAME
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("thing_of_my_own", "beside_the_device"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "beside_the_device.py").write_text("NAME = 'thing'\n")
    path = tmp_path / "thing_of_my_own.py"
    path.write_text(SOURCE)
    return path


def test_a_class_is_found_with_what_lies_beside_its_file(file: Path) -> None:
    device = load_device(f"{file}:Thing")
    assert isinstance(device, Device)
    assert device.name == "thing"
    assert sys.modules[type(device).__module__].NAME == "thing"


def test_what_is_wrong_is_said(file: Path) -> None:
    with pytest.raises(LoadError, match="no such file"):
        load_device(f"{file.parent}/none.py:Thing")
    with pytest.raises(LoadError, match="has no Other"):
        load_device(f"{file}:Other")
    with pytest.raises(LoadError, match="is not a subclass"):
        load_device(f"{file}:NAME")
    text = file.with_suffix(".txt")
    text.write_text(SOURCE)
    with pytest.raises(LoadError, match="no file of Python"):
        load_device(f"{text}:Thing")
