# SPDX-License-Identifier: GPL-2.0-or-later
"""VMBus devices in Python, outside the hypervisor, for QEMU."""
