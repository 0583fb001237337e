# SPDX-License-Identifier: GPL-2.0-or-later
"""The vhost-user side: messages, framing, session (no I/O), and the server that does the I/O.

The protocol is ``docs/vhost-user-vmbus.md``. From the bottom up: :mod:`.messages`
(fields), :mod:`.codec` (framing), :mod:`.session` (order), :mod:`.sockets` (bytes and
descriptors on real sockets), :mod:`.backchannel` (back-end requests), :mod:`.server`.
"""
