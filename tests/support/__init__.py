# SPDX-License-Identifier: GPL-2.0-or-later
"""The support that tests share: machines, servers, devices, ways to wait; a module for each."""
