# SPDX-License-Identifier: GPL-2.0-or-later
"""The errors of a virtual machine; every message is for the user."""


class VmError(Exception):
    """Base of this room's errors."""


class SetupError(VmError):
    """Something that a machine needs is missing or cannot be used; nothing was started."""


class GuestFailure(VmError):
    """The guest panicked, hung, never came up, or stopped when it should not have.

    ``console`` holds the last lines of its console.
    """

    def __init__(self, message: str, console: list[str] | None = None) -> None:
        super().__init__(message)
        self.console = console or []

    def __str__(self) -> str:
        text = super().__str__()
        if self.console:
            text += "\nThe guest's last console lines:\n"
            text += "\n".join("  | " + line for line in self.console)
        return text


class GuestTimeout(GuestFailure):
    """The guest did not do in time what it was waited for."""
