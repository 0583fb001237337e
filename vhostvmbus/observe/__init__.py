# SPDX-License-Identifier: GPL-2.0-or-later
"""The view of a device from outside while it is being served.

:mod:`.statistics` serves its counters on a socket beside the device's, and reads them from there.
This room asks a device for a snapshot and never changes it: whoever serves a device hands the
snapshot in, so that no room below knows that it is observed.
"""
