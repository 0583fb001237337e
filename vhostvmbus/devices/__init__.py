# SPDX-License-Identifier: GPL-2.0-or-later
"""VMBus devices, one package each: its wire protocol and its backing store."""
