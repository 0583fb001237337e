# SPDX-License-Identifier: GPL-2.0-or-later
"""The synthetic network card (class f8615163-df3e-46c5-913f-f2d2f965ed0e).

From the wire inwards: :mod:`.nvsp` messages, :mod:`.rndis` inside them with :mod:`.ppi` beside each
frame, :mod:`.oids` with :mod:`.offloads` and :mod:`.rss`, :mod:`.protocol` what is answered;
:mod:`.buffers` the memory that the guest lends, :mod:`.sender` and :mod:`.receiver` the frames
themselves with :mod:`.frame` for their headers, and :mod:`.card` where all meet the channels and a
:mod:`.link`, which is the way out.
"""

from vhostvmbus.devices.net.card import NetworkCard

__all__ = ["NetworkCard"]
