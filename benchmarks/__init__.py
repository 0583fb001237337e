# SPDX-License-Identifier: GPL-2.0-or-later
"""Measurements, always beside a reference of the same run: ``python -m benchmarks [NAME ...]``.

A benchmark is a module in here with ``tables(seconds) -> list[Table]``, where ``seconds`` is how
long to spend on each figure. One that needs a machine also has ``prepare()``, which builds and
fetches what is missing and is called before anything is measured. Absolute figures mean little on
another machine; the ratios do.
"""
