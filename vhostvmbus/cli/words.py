# SPDX-License-Identifier: GPL-2.0-or-later
"""The words of a command for its user, beside its output: on stderr."""

import sys


def say(text: str) -> None:
    """Tells the user something."""
    print(text, file=sys.stderr, flush=True)


def in_words(error: Exception) -> str:
    """Returns what is wrong; for an error of the system without its number, its file first."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([" and ".join(names), error.strerror] if names else [error.strerror])
