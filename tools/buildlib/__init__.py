# SPDX-License-Identifier: GPL-2.0-or-later
"""What the project's own build scripts share: a private apt, a content-keyed cache, progress.

Standard library only, because it runs before the project's virtual environment exists.
Used by ``qemu/build`` and ``guest-images/build``.
"""
