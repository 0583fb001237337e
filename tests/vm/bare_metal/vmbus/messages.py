# SPDX-License-Identifier: GPL-2.0-or-later
"""What the bare-metal guest reports of the bus."""

from typing import Protocol

from tests.support.bare_metal import Report


class CommandFor(Protocol):
    """Makes QEMU's command line of a scenario and further words."""

    def __call__(self, scenario: str, *words: str) -> list[str]: ...


NOTHING = 0xFFFFFFFF
OFFER_CHANNEL = 1
RESCIND_OFFER = 2
ALL_OFFERS_DELIVERED = 4
OPEN_RESULT = 6
GPADL_CREATED = 10
GPADL_TORNDOWN = 12
VERSION_RESPONSE = 15
UNLOAD_RESPONSE = 17

CONTACT: Report = [
    ("contact", VERSION_RESPONSE),
    ("supported", 1),
    ("end_of_offers", ALL_OFFERS_DELIVERED),
    ("offers", 1),
]
ALIVE: Report = [("alive", 1), *CONTACT]
