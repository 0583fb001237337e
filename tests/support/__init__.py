# SPDX-License-Identifier: GPL-2.0-or-later
"""What tests share: machines, servers, devices, ways to wait. A module for each kind."""
