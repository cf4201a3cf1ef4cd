"""Exports, and the NBD server that commands start."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, Tag

from nbdserve.admin.blockdev import InetAddress, UnixPath
from nbdserve.admin.command import Command
from nbdserve.admin.commands.bitmaps import BitmapOrName
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.exports import ExportEntry, RemoveMode
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Nothing, Result, Uint32, union
from nbdserve.admin.transaction import Action
from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.node import Node
from nbdserve.exports.export import Export
from nbdserve.server.addresses import Address, TcpAddress, parse_port, unix_address


class InetBranch(Arguments):
    """TCP."""

    type: Literal["inet"]
    data: InetAddress


class UnixBranch(Arguments):
    """A unix socket."""

    type: Literal["unix"]
    data: UnixPath


SocketAddress: TypeAlias = Annotated[
    Annotated[InetBranch, Tag("=inet")] | Annotated[UnixBranch, Tag("=unix")], union("type")
]


class ServerStart(Arguments):
    """Of ``nbd-server-start``."""

    addr: SocketAddress
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: Uint32 = 0


class ExportOptions(Arguments):
    """BlockExportOptions of the type ``nbd``. I/O threads are accepted and change nothing."""

    type: Literal["nbd"]
    id: str
    fixed_iothread: bool = False
    iothread: str | None = None
    node_name: str
    writable: bool = False
    name: str | None = None
    description: str = ""
    bitmaps: list[BitmapOrName] = Field(default=[])
    allocation_depth: bool = False


class ExportRemove(Arguments):
    """Of ``block-export-del``."""

    id: str
    mode: RemoveMode = "safe"


class ServerAdd(Arguments):
    """Of ``nbd-server-add``, which ``block-export-add`` has replaced."""

    name: str | None = None
    description: str = ""
    device: str
    writable: bool = False


class ServerRemove(Arguments):
    """Of ``nbd-server-remove``."""

    name: str
    mode: RemoveMode = "safe"


class BlockExportInfo(Result):
    """An export."""

    id: str
    type: str = "nbd"
    node_name: str
    shutting_down: bool


async def nbd_server_start(control: Control, arguments: ServerStart) -> None:
    """Listen on an address, besides those the server was started with."""
    if arguments.tls_creds is not None:
        if control.objects.find(arguments.tls_creds) is not None:
            raise QmpError(f"Object with id '{arguments.tls_creds}' is not TLS credentials")
        raise QmpError(f"No TLS credentials with id '{arguments.tls_creds}'")
    if arguments.tls_authz is not None:
        raise QmpError("'tls-authz' judges the identities of TLS clients: give 'tls-creds' as well, or leave it out")
    address = _address(arguments.addr)
    if isinstance(address, TcpAddress) or address.abstract:
        await control.exports.start_server(address, arguments.max_connections)
        return
    directory = await asyncio.to_thread(control.private_paths.directory_of, address.path)
    try:
        await control.exports.start_server(address, arguments.max_connections, directory)
    finally:
        os.close(directory)


def _address(given: SocketAddress) -> Address:
    if isinstance(given, UnixBranch):
        return unix_address(given.data.path)
    return TcpAddress(given.data.host or "*", parse_port(given.data.port))


async def nbd_server_stop(control: Control, arguments: Nothing) -> None:
    """Undo ``nbd-server-start``; exports that commands have added go, with their clients."""
    control.exports.stop_server()


async def block_export_add(control: Control, arguments: ExportOptions) -> None:
    """Offer a node to NBD clients."""
    _add(control, arguments)


def _add(control: Control, arguments: ExportOptions) -> None:
    name = arguments.node_name if arguments.name is None else arguments.name
    if arguments.iothread is not None and control.objects.find(arguments.iothread, "iothread") is None:
        raise QmpError(f'iothread "{arguments.iothread}" not found')
    control.exports.check_id(arguments.id)
    entry = control.nodes.get(arguments.node_name)
    control.exports.check_name(name)
    if arguments.writable and entry.node.read_only:
        raise QmpError(f"Block node is read-only: '{entry.name}' cannot be exported writable")
    export = Export(
        name,
        entry.node,
        description=arguments.description,
        read_only=not arguments.writable,
        allocation_depth=arguments.allocation_depth,
        bitmaps=[_bitmap(control, entry, given) for given in arguments.bitmaps],
    )
    control.exports.add(arguments.id, entry, export)


def _bitmap(control: Control, entry: NodeEntry, given: BitmapOrName) -> DirtyBitmap:
    """One of the node's bitmaps, or of another's. It stays usable: clients see it as it is when they ask."""
    name = given if isinstance(given, str) else given.name
    bitmap = (entry if isinstance(given, str) else control.nodes.either(given.node)).node.bitmaps.find(name)
    if bitmap is None:
        raise QmpError(f"Bitmap '{name}' is not found")
    return bitmap


class ExportAddAction(Action):
    """``block-export-add`` in a transaction: what clients see of the disk begins with its other actions."""

    def __init__(self, control: Control, arguments: ExportOptions) -> None:
        self._control = control
        self._arguments = arguments

    def nodes(self) -> Sequence[Node]:
        return [self._control.nodes.get(self._arguments.node_name).node]

    async def prepare(self) -> None:
        _add(self._control, self._arguments)

    async def abort(self) -> None:
        self._control.exports.remove(self._arguments.id, "hard")


class ExportDelAction(Action):
    """``block-export-del`` in a transaction: nobody new finds it any more, and when all have succeeded it is gone."""

    _export: ExportEntry

    def __init__(self, control: Control, arguments: ExportRemove) -> None:
        self._exports = control.exports
        self._arguments = arguments

    def nodes(self) -> Sequence[Node]:
        return [self._exports.get(self._arguments.id).entry.node]

    async def prepare(self) -> None:
        if self._exports.get(self._arguments.id).shutting_down:
            raise QmpError(f"Export '{self._arguments.id}' is already shutting down")
        self._export = self._exports.begin_removal(self._arguments.id, self._arguments.mode)

    def commit(self) -> None:
        self._exports.end_removal(self._export, self._arguments.mode)

    async def abort(self) -> None:
        self._exports.undo_removal(self._export)


async def block_export_del(control: Control, arguments: ExportRemove) -> None:
    """Take an export away."""
    control.exports.remove(arguments.id, arguments.mode)


async def nbd_server_add(control: Control, arguments: ServerAdd) -> None:
    """``block-export-add`` with the export's name as its id; a disk that is read-only is exported so."""
    entry = control.nodes.either(arguments.device)
    name = arguments.name if arguments.name is not None else arguments.device
    options = ExportOptions(
        type="nbd",
        id=name,
        node_name=entry.name,
        name=name,
        description=arguments.description,
        writable=arguments.writable and not entry.node.read_only,
    )
    await block_export_add(control, options)


async def nbd_server_remove(control: Control, arguments: ServerRemove) -> None:
    """``block-export-del``."""
    control.exports.remove(arguments.name, arguments.mode)


async def query_block_exports(control: Control, arguments: Nothing) -> list[BlockExportInfo]:
    """All there are, the newest first."""
    return [
        BlockExportInfo(id=export.id, node_name=export.entry.name, shutting_down=export.shutting_down)
        for export in reversed(list(control.exports))
    ]


COMMANDS: Final = (
    Command("nbd-server-start", nbd_server_start, ServerStart),
    Command("nbd-server-stop", nbd_server_stop),
    Command("nbd-server-add", nbd_server_add, ServerAdd),
    Command("nbd-server-remove", nbd_server_remove, ServerRemove),
    Command("block-export-add", block_export_add, ExportOptions),
    Command("block-export-del", block_export_del, ExportRemove),
    Command("query-block-exports", query_block_exports, returns=list[BlockExportInfo]),
)
