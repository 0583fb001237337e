# SPDX-License-Identifier: GPL-2.0-or-later
"""The synthetic network card (class f8615163-df3e-46c5-913f-f2d2f965ed0e).

From the wire inwards: :mod:`.nvsp` has the messages, :mod:`.rndis` those inside them, and
:mod:`.oids` with :mod:`.offloads` and :mod:`.rss` the settings; :mod:`.protocol` says what is
answered. :mod:`.buffers` is the memory that the guest lends. Frames themselves pass in C, in
``native/``, which :mod:`.datapath` drives; :mod:`.outbox` and :mod:`.receiver` do what is left of
it. In :mod:`.card` all meet the channels and a :mod:`.link`, which is the way out.
"""

from vhostvmbus.devices.net.card import NetworkCard

__all__ = ["NetworkCard"]
