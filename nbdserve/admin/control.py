"""What admin commands act on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nbdserve.admin.command import Commands
from nbdserve.admin.events import SHUTDOWN, Events, Shutdown
from nbdserve.admin.schema import Result

QEMU_VERSION = (7, 2, 0)
"""Whose commands and texts these are; clients choose their ways by it."""


class VersionTriple(Result):
    """Of QEMU."""

    micro: int
    minor: int
    major: int


class VersionInfo(Result):
    """Of ``query-version`` and the greeting."""

    qemu: VersionTriple
    package: str


@dataclass
class Control:
    """The running server, as commands see it."""

    package: str
    """Our own name and version."""
    stop: Callable[[], None]
    """End the server as the first signal does."""
    commands: Commands = field(default_factory=dict)
    events: Events = field(default_factory=Events)

    _asked_to_quit: bool = False

    def quit(self) -> None:
        """End the server: a client asks for it."""
        self._asked_to_quit = True
        self.stop()

    def announce_end(self) -> None:
        """Tell every client that the server ends, and why."""
        reason = "host-qmp-quit" if self._asked_to_quit else "host-signal"
        self.events.emit(SHUTDOWN, Shutdown(guest=False, reason=reason))

    @property
    def version(self) -> VersionInfo:
        major, minor, micro = QEMU_VERSION
        return VersionInfo(qemu=VersionTriple(micro=micro, minor=minor, major=major), package=self.package)
