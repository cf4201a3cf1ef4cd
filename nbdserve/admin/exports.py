"""Exports that come and go while the server runs, and the NBD server that commands start and stop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nbdserve.admin.errors import WELL_FORMED, QmpError
from nbdserve.admin.events import BLOCK_EXPORT_DELETED, Events, ExportDeleted
from nbdserve.admin.nodes import NodeEntry
from nbdserve.errors import ConfigError
from nbdserve.exports.export import Export
from nbdserve.server.addresses import Address
from nbdserve.server.listeners import Listener, bind
from nbdserve.server.server import Places, Server


@dataclass(eq=False)
class ExportEntry:
    """An export and the id commands know it by."""

    id: str
    export: Export
    entry: NodeEntry
    permanent: bool = False
    """Made at the start; ``nbd-server-stop`` leaves it."""
    shutting_down: bool = False

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

    async def start_server(self, address: Address, max_clients: int = 0) -> None:
        """Listen on one more address, to so many clients at a time (0: any number).

        QmpError when a command has started a server already, or it cannot be bound.
        """
        if self._listeners:
            raise QmpError("NBD server already running")
        try:
            self._listeners = bind(address)
        except ConfigError as error:
            raise QmpError(str(error)) from None
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
                self.remove(export.id, hard=True)

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
        if any(export.export.name == name for export in self):
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

    def remove(self, identity: str, *, hard: bool = False) -> None:
        """Take the export away. QmpError while it has clients, unless ``hard``, which drops them."""
        export = self.get(identity)
        if export.export.connections and not hard:
            raise QmpError(f"export '{identity}' still in use")
        del self._exports[identity]
        self.server.exports.remove(export.export.name)
        self.server.drop_clients(export.export)
        export.entry.users.remove(export.label)
        self.events.emit(BLOCK_EXPORT_DELETED, ExportDeleted(id=identity))
