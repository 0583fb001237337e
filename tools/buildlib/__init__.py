# SPDX-License-Identifier: GPL-2.0-or-later
"""The common part of the project's own build scripts: a private apt, a content-keyed cache,
progress.

It uses the standard library only, because it runs before the project's virtual environment exists.
``qemu/build`` and ``guest-images/build`` use it.
"""
