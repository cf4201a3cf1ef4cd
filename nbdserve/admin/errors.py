"""Errors as QMP tells them: a class, which programs look at, and a description, which people read."""

from __future__ import annotations

import os
import re
from typing import Final

from nbdserve.errors import NbdserveError

GENERIC = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"
DEVICE_NOT_FOUND = "DeviceNotFound"
DEVICE_NOT_ACTIVE = "DeviceNotActive"

WELL_FORMED: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
"""QEMU's rule for the names that users give."""


class QmpError(NbdserveError):
    """A command fails; ``kind`` is the error class."""

    def __init__(self, description: str, kind: str = GENERIC) -> None:
        super().__init__(description)
        self.kind = kind


def description_of(error: BaseException) -> str:
    """What to tell a client about an error raised on purpose or by the kernel."""
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
