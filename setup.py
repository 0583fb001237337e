# SPDX-License-Identifier: GPL-2.0-or-later
"""Only what pyproject.toml cannot say: that the ring engine is built through cffi."""

from setuptools import setup

setup(cffi_modules=["vhostvmbus/engine/build.py:ffibuilder"])
