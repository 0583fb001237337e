# SPDX-License-Identifier: GPL-2.0-or-later
"""Virtual machines to try and test devices in: images, QEMU, the guest's console and commands.

Knows how to start QEMU and what a guest is made of; knows nothing of a device's protocol, and
nothing of QEMU's sources or Debian's archive, which ``qemu/`` and ``guest-images/`` know.
"""
