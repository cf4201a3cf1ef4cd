"""Exports that come and go while the server runs, and the NBD server that commands start and stop."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeAlias

from nbdserve.admin.errors import WELL_FORMED, QmpError
from nbdserve.admin.events import BLOCK_EXPORT_DELETED, BLOCK_IO_ERROR, Events, ExportDeleted, IoError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.errors import ConfigError, errno_of
from nbdserve.exports.export import Export
from nbdserve.server.addresses import Address, UnixAddress
from nbdserve.server.listeners import Listener, bind
from nbdserve.server.server import Places, Server

RemoveMode: TypeAlias = Literal["safe", "hide", "soft", "hard"]
"""What becomes of the clients of an export that is removed; ``safe``: it must have none."""
_HARDER: Final = ("soft", "hard")
"""What may follow ``hide``."""
_READING: Final = frozenset({"READ", "CACHE", "BLOCK_STATUS"})


@dataclass(eq=False)
class ExportEntry:
    """An export and the id commands know it by."""

    id: str
    export: Export
    entry: NodeEntry
    permanent: bool = False
    """Made at the start; ``nbd-server-stop`` leaves it."""
    shutting_down: bool = False
    """No new client finds it."""
    default_before: str | None = None
    """What the default export was before it was hidden."""

    @property
    def label(self) -> str:
        """What it is to its node."""
        return f"export '{self.id}'"


@dataclass(eq=False)
class ExportControl:
    """The exports by id, in order of creation."""

    server: Server
    events: Events
    listening: bool = False
    """There are sockets of the start."""
    _exports: dict[str, ExportEntry] = field(default_factory=dict)
    _listeners: list[Listener] = field(default_factory=list)

    def __iter__(self) -> Iterator[ExportEntry]:
        return iter(list(self._exports.values()))

    # --- the server --------------------------------------------------------------------------------------------------

    async def start_server(self, address: Address, max_clients: int = 0, directory: int | None = None) -> None:
        """Listen on one more address, to so many clients at a time (0: any number).

        ``directory``: the descriptor of the one that a unix socket has to be in. QmpError when a command has started a
        server already, or it cannot be bound.
        """
        if self._listeners:
            raise QmpError("NBD server already running")
        try:
            listeners = bind(address)
        except ConfigError as error:
            raise QmpError(str(error)) from None
        if directory is not None and not _is_in(listeners[0], directory):
            listeners[0].close()
            raise QmpError(f"Failed to bind socket to {address}: its directory was moved meanwhile")
        self._listeners = listeners
        places = Places(max_clients) if max_clients else None
        for listener in self._listeners:
            await self.server.listen(listener.sock, places)

    def stop_server(self) -> None:
        """Undo ``start_server``, and remove the exports that commands have added; their clients are dropped."""
        if not self._listeners:
            raise QmpError("NBD server not running")
        self.close_listeners()
        for export in self:
            if not export.permanent:
                self.remove(export.id, "hard")

    def close_listeners(self) -> None:
        """Accept nobody on the sockets that commands have opened, and remove their files. Idempotent."""
        for listener in self._listeners:
            self.server.unlisten(listener.sock)
            listener.close()
        self._listeners = []

    # --- exports -----------------------------------------------------------------------------------------------------

    def adopt(self, export: ExportEntry) -> None:
        """An export that the server has already."""
        self._exports[export.id] = export
        export.export.on_failure = partial(self._failed, export)
        export.entry.users.append(export.label)

    def check_id(self, identity: str) -> None:
        """QmpError when no new export may have this id."""
        if not WELL_FORMED.fullmatch(identity):
            raise QmpError("Invalid block export id")
        if identity in self._exports:
            raise QmpError(f"Block export id '{identity}' is already in use")

    def check_name(self, name: str) -> None:
        """QmpError when there is no server, or it has an export of this name."""
        if not (self._listeners or self.listening):
            raise QmpError("NBD server not running")
        if any(export.export.name == name and not export.shutting_down for export in self):
            raise QmpError(f"NBD server already has export named '{name}'")

    def add(self, identity: str, entry: NodeEntry, export: Export) -> None:
        """Offer ``export`` to clients from now on."""
        self.check_id(identity)
        self.check_name(export.name)
        self.server.exports.add(export)
        self.adopt(ExportEntry(identity, export, entry))

    def move(self, old: NodeEntry, new: NodeEntry) -> None:
        """The exports of ``old`` are those of ``new``, which has its node now."""
        for export in self:
            if export.entry is old:
                old.users.remove(export.label)
                new.users.append(export.label)
                export.entry = new

    def get(self, identity: str) -> ExportEntry:
        """QmpError when there is none."""
        export = self._exports.get(identity)
        if export is None:
            raise QmpError(f"Export '{identity}' is not found")
        return export

    def remove(self, identity: str, mode: RemoveMode = "safe") -> None:
        """Take the export away: ``begin_removal`` and ``end_removal``."""
        self.end_removal(self.begin_removal(identity, mode), mode)

    def begin_removal(self, identity: str, mode: RemoveMode = "safe") -> ExportEntry:
        """Let no new client find the export. QmpError while it has clients and is to be removed ``safe``."""
        export = self.get(identity)
        if export.export.connections and mode == "safe":
            raise QmpError(f"export '{identity}' still in use")
        if not export.shutting_down:
            table = self.server.exports
            export.default_before = table.default
            table.remove(export.export.name)
            export.shutting_down = True
        elif mode not in _HARDER:
            raise QmpError(f"Export '{identity}' is already shutting down")
        return export

    def undo_removal(self, export: ExportEntry) -> None:
        """Undo ``begin_removal``."""
        table = self.server.exports
        table.add(export.export)
        table.default = export.default_before
        export.shutting_down = False

    def end_removal(self, export: ExportEntry, mode: RemoveMode) -> None:
        """``hide``: its clients stay, and when the last one has left it is gone. ``soft``: they are answered ESHUTDOWN
        from now on. Else they are dropped."""
        if mode in ("hide", "soft") and export.export.connections:
            export.export.on_idle = lambda: self._forget(export)
            if mode == "soft":
                self.server.drain_clients(export.export)
        else:
            self._forget(export)

    def _forget(self, export: ExportEntry) -> None:
        export.export.on_idle = lambda: None
        export.export.on_failure = lambda name, error: None
        del self._exports[export.id]
        self.server.drop_clients(export.export)
        export.entry.users.remove(export.label)
        self.events.emit(BLOCK_EXPORT_DELETED, ExportDeleted(id=export.id))

    def _failed(self, export: ExportEntry, name: str, error: Exception) -> None:
        """Tell of a request that failed. "Not faster than writing" is an answer, not a failure."""
        code = errno_of(error)
        if code == errno.ENOTSUP:
            return
        problem = IoError(
            device="",
            node_name=export.entry.name,
            operation="read" if name in _READING else "write",
            action="report",
            nospace=code == errno.ENOSPC,
            reason=os.strerror(code),
        )
        self.events.emit(BLOCK_IO_ERROR, problem)


def _is_in(listener: Listener, directory: int) -> bool:
    """Whether its file is there."""
    assert isinstance(listener.address, UnixAddress)
    try:
        status = os.stat(Path(listener.address.path).name, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == listener.identity
