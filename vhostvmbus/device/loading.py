# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices of the user's own: a class in a file that no package has, named ``path.py:Class``."""

import importlib.util
import sys
from pathlib import Path

from vhostvmbus.device.device import Device


class LoadError(Exception):
    """A device that cannot be had; the message is for the user."""


def load_device(name: str) -> Device:
    """Returns an instance of the class that ``path.py:Class`` names.

    The file's folder is put in front of the import path, so that the file can import what lies
    beside it. Raises :exc:`LoadError` if there is no such file, no such class in it, or the class
    is no device; and whatever the file itself raises.
    """
    path, _, class_name = name.rpartition(":")
    if not Path(path).is_file():
        raise LoadError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise LoadError(f"{path} is no file of Python: its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec.loader.exec_module(module)
    kind = getattr(module, class_name, None)
    if kind is None:
        raise LoadError(f"{path} has no {class_name}")
    if not (isinstance(kind, type) and issubclass(kind, Device)):
        raise LoadError(f"{class_name} in {path} is not a subclass of vhostvmbus.device.Device")
    return kind()
