"""What admin commands act on: the nodes, exports, objects and jobs of the running server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from nbdserve.admin.command import Commands
from nbdserve.admin.events import RESUME, SHUTDOWN, STOP, Events, Shutdown
from nbdserve.admin.exports import ExportControl, ExportEntry
from nbdserve.admin.job_control import JobControl
from nbdserve.admin.nodes import NodeEntry, NodeTable
from nbdserve.admin.objects import ObjectTable
from nbdserve.admin.opening import Opener
from nbdserve.admin.paths import PathPolicy, PrivatePaths
from nbdserve.admin.schema import Result
from nbdserve.admin.thresholds import Thresholds
from nbdserve.block.drain import drained
from nbdserve.exports.export import Export
from nbdserve.formats.registry import DRIVERS
from nbdserve.server.server import Server
from nbdserve.storage.nbd_target import is_nbd

_DISKS = frozenset({*DRIVERS, "throttle"})
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


def _no_secrets(properties: Mapping[str, str], opener: Callable[[str, int], int]) -> bytes:
    raise NotImplementedError


@dataclass(eq=False)
class Control:
    """The running server, as commands see it."""

    package: str
    """Our own name and version."""
    stop: Callable[[], None]
    """End the server as the first signal does."""
    server: Server
    commands: Commands = field(default_factory=dict)
    read_secret: Callable[[Mapping[str, str], Callable[[str, int], int]], bytes] = _no_secrets
    """What the properties of a ``secret`` object describe, in a file that is opened so; ConfigError. It may block."""

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.events = Events()
        self.nodes = NodeTable()
        self.paths = PathPolicy()
        self.private_paths = PrivatePaths(self.paths)
        self.objects = ObjectTable()
        self.exports = ExportControl(self.server, self.events)
        self.jobs = JobControl(self.events)
        self.opener = Opener(self.nodes, self.paths, self.objects)
        self.thresholds = Thresholds(self.events)
        self.quiesced: AsyncExitStack | None = None
        """While ``stop`` holds all requests back."""
        self._asked_to_quit = False

    def adopt(
        self,
        exports: Iterable[tuple[Export, str]],
        roots: Iterable[str],
        *,
        private_roots: Iterable[str] = (),
        listening: bool,
    ) -> None:
        """Take in what the server was started with: exports, each with the cache mode of its node, and roots."""
        self.exports.listening = listening
        for root in roots:
            self.paths.add(root)
        for root in private_roots:
            self.private_paths.add(root)
        for export, cache in exports:
            node = export.node
            entry = next((entry for entry in self.nodes if entry.node is node), None)
            if entry is None:
                name = self.nodes.fitting_name(export.name or Path(node.path).name)
                entry = NodeEntry(name, node.format, node, cache, permanent=True)
                self.nodes.add(entry)
                if not is_nbd(node.path):
                    self.paths.add(Path(node.path).absolute().parent)
            identity = export.name or entry.name
            self.exports.adopt(ExportEntry(identity, export, entry, permanent=True))

    async def quiesce(self) -> None:
        """Hold back the requests of every exported disk until ``resume``. Once."""
        if self.quiesced is not None:
            return
        held = AsyncExitStack()
        nodes = {export.entry.node for export in self.exports}
        await held.enter_async_context(drained(*nodes))
        self.quiesced = held
        self.events.emit(STOP)

    async def resume(self) -> None:
        """Undo ``quiesce``. Idempotent."""
        held, self.quiesced = self.quiesced, None
        if held is not None:
            await held.aclose()
            self.events.emit(RESUME)

    def quit(self) -> None:
        """End the server: a client asks for it."""
        self._asked_to_quit = True
        self.stop()

    async def begin_end(self) -> None:
        """The server ends: nothing is held back any more, jobs are cancelled, and nobody new is
        accepted on sockets of commands."""
        await self.resume()
        self.objects.let_go()
        self.exports.close_listeners()
        await self.jobs.jobs.close()

    def announce_end(self) -> None:
        """Tell every client that the server ends, and why."""
        reason = "host-qmp-quit" if self._asked_to_quit else "host-signal"
        self.events.emit(SHUTDOWN, Shutdown(guest=False, reason=reason))

    async def close(self) -> None:
        """Close what commands have opened. The first error is raised after all is closed."""
        await self.nodes.close()

    @property
    def version(self) -> VersionInfo:
        """QEMU's, and our own as its package."""
        major, minor, micro = QEMU_VERSION
        return VersionInfo(qemu=VersionTriple(micro=micro, minor=minor, major=major), package=self.package)

    def device_of(self, qdev: str) -> NodeEntry | None:
        """The disk that ``query-block`` shows under this ``qdev``."""
        return next((entry for entry in self.devices() if entry.name == qdev), None)

    def devices(self) -> list[NodeEntry]:
        """The disks that no other node uses, and those that are exported."""
        exported = {export.entry for export in self.exports}
        return [
            entry
            for entry in self.nodes
            if entry in exported
            or (entry.driver in _DISKS and not any(user.startswith("node ") for user in entry.users))
        ]
