# SPDX-License-Identifier: GPL-2.0-or-later
"""Tells which downloads fail for a reason that may pass, how often to try, and how long to wait.

The words of programs that the network failed are in ``passing.txt``: a part of a line on each line,
in small letters. ``tools/setup`` reads it, too. Every other reason for a download to fail (a file
that is not there, an unknown package, a bad signature) is final.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAMS = ("apt-get", "mmdebstrap")
DELAYS = "5 15 45"
"""The seconds before each further try; ``$RETRY_DELAYS`` says others."""
_PASSING = tuple(Path(__file__).with_name("passing.txt").read_text().splitlines())
_SHOWN = 200


def downloads(words: Sequence[str]) -> bool:
    """Tells whether a command is one that downloads, and may be given again if it failed."""
    return Path(words[0]).name in PROGRAMS or list(words[1:3]) == ["-m", "pip"]


def delays() -> list[float]:
    """Returns how many seconds to wait before each further try. Raises ValueError."""
    text = os.environ.get("RETRY_DELAYS", DELAYS)
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        message = f"RETRY_DELAYS={text!r}: seconds, with blanks between them"
        raise ValueError(message) from None


def in_english(env: Mapping[str, str]) -> dict[str, str]:
    """Returns an environment in which programs say what went wrong in the words known here."""
    return {**env, "LC_ALL": "C.UTF-8", "LANGUAGE": ""}


def passing_reason(output: str) -> str:
    """Returns the last line that blames the network in what a command wrote; "" if none does."""
    for line in reversed(output.splitlines()):
        if any(words in line.lower() for words in _PASSING):
            return line.strip()[:_SHOWN]
    return ""


def advice(tries: int, reason: str) -> str:
    """Returns what to tell a user whose download failed in every one of so many tries."""
    return (
        f"failed in {tries} of {tries} tries; the last time: {reason}\n"
        "The network is to blame: look at the connection, at name resolution and at proxies, then "
        "start again. What is finished is kept. RETRY_DELAYS= names the seconds before each "
        f'further try (default: "{DELAYS}").'
    )
