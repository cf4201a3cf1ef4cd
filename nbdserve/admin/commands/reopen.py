"""``blockdev-reopen``: other options for nodes that are open, under their clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from nbdserve.admin.blockdev import BlockdevOptions, FileOptions, ImageOptions, LuksOptions, RawOptions
from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.opening import cache_mode
from nbdserve.admin.paths import full_path
from nbdserve.admin.schema import Arguments
from nbdserve.admin.transaction import Action, execute
from nbdserve.block.graph import Origin, reopen
from nbdserve.block.node import Node
from nbdserve.storage.base import Storage


class ReopenOptions(Arguments):
    """Of ``blockdev-reopen``: as for ``blockdev-add``, with the file each node has."""

    options: list[BlockdevOptions]


_Reopened = FileOptions | RawOptions | ImageOptions | LuksOptions


class Reopen(Action):
    """``read-only``, ``discard`` and ``detect-zeroes`` of one node become what is given, or the default."""

    def __init__(self, control: Control, given: BlockdevOptions) -> None:
        self._control = control
        self._given = given
        self._before: tuple[bool, bool, str] | None = None

    @property
    def _entry(self) -> NodeEntry:
        name = self._given.node_name
        if name is None:
            raise QmpError("node-name not specified")
        entry = next((entry for entry in self._control.nodes if entry.name == name), None)
        if entry is None:
            raise QmpError(f"Failed to find node with node-name='{name}'")
        return entry

    def nodes(self) -> Sequence[Node]:
        return [self._entry.node]

    async def prepare(self) -> None:
        given, entry = self._given, self._entry
        node = entry.node
        if not isinstance(given, _Reopened) or entry.is_filter or entry.inner is not None:
            raise QmpError(f"'{entry.name}': nodes of the driver '{entry.driver}' cannot be opened again")
        self._check_file(given, entry)
        if given.driver != entry.driver:
            raise QmpError("Cannot change the option 'driver'")
        if cache_mode(given) != entry.cache:
            raise QmpError("Cannot change the option 'cache'")
        if isinstance(given, ImageOptions) and "backing" in given.model_fields_set:
            raise QmpError("'backing': block-stream, block-commit and blockdev-snapshot change what is below a layer")
        self._control.jobs.check_free(entry)
        if given.read_only and self._is_written(entry):
            raise QmpError(f"Read-only block node '{entry.name}' cannot support read-write users")
        before = node.read_only, node.unmap, node.detect_zeroes
        await self._open(entry, given.read_only, given.discard == "unmap", given.detect_zeroes)
        self._before = before

    def _is_written(self, entry: NodeEntry) -> bool:
        exported = any(export.entry is entry and not export.export.read_only for export in self._control.exports)
        return exported or any(not user.startswith("export ") for user in entry.users)

    def _check_file(self, given: _Reopened, entry: NodeEntry) -> None:
        """QmpError unless it is the one there is."""
        storage: Storage = entry.node.top.storage
        file = given if isinstance(given, FileOptions) else given.file
        if isinstance(file, str):
            part = self._control.nodes.find(file)
            if part is None:
                raise QmpError(f"Cannot find device='' nor node-name='{file}'")
            is_same = part in entry.children or entry.inner_names.get(file) is storage
        else:
            is_same = isinstance(file, FileOptions) and full_path(file.filename) == storage.path
        if not is_same:
            raise QmpError("Cannot change the option 'filename'")

    async def _open(self, entry: NodeEntry, read_only: bool, unmap: bool, detect_zeroes: str) -> None:
        node, old = entry.node, entry.node.top
        origin, before = old.origin, (node.unmap, node.detect_zeroes)
        if not isinstance(origin, Origin):
            raise QmpError(f"'{entry.name}': its file cannot be opened again")
        old.origin = replace(origin, spec=replace(origin.spec, discard="unmap" if unmap else "ignore"))
        node.unmap, node.detect_zeroes = unmap, detect_zeroes
        try:
            await reopen(node, 0, read_only=read_only)
        except BaseException:
            node.unmap, node.detect_zeroes = before
            node.top.origin = origin
            raise
        finally:
            self._control.nodes.renew(entry, old, node.top)

    async def abort(self) -> None:
        assert self._before is not None
        await self._open(self._entry, *self._before)


async def blockdev_reopen(control: Control, arguments: ReopenOptions) -> None:
    """Change all of the nodes, or none; the requests of their clients are held back meanwhile."""
    await execute([Reopen(control, given) for given in arguments.options])


COMMANDS: Final = (Command("blockdev-reopen", blockdev_reopen, ReopenOptions),)
