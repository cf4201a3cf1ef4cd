"""``blockdev-reopen``: other options for nodes that are open, under their clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from nbdserve.admin.backing import check_backing, close_layers, open_below
from nbdserve.admin.blockdev import BlockdevOptions, FileOptions, ImageOptions, LuksOptions, RawOptions
from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.opening import cache_mode
from nbdserve.admin.paths import full_path
from nbdserve.admin.schema import Arguments
from nbdserve.admin.transaction import Action, execute
from nbdserve.block.graph import Origin
from nbdserve.block.node import Node
from nbdserve.block.reopening import reopen
from nbdserve.block.spec import BackingSpec, ImageSpec
from nbdserve.formats.base import FormatDriver
from nbdserve.storage.base import Storage

_WRITETHROUGH: Final = ("writethrough", "directsync")
"""What QMP has no word for, of disks that were opened at the start."""


class ReopenOptions(Arguments):
    """Of ``blockdev-reopen``: as for ``blockdev-add``, with the file each node has."""

    options: list[BlockdevOptions]


_Reopened = FileOptions | RawOptions | ImageOptions | LuksOptions


@dataclass(frozen=True, slots=True)
class _State:
    """What may be changed of a node."""

    read_only: bool
    unmap: bool
    detect_zeroes: str
    cache: str
    below: Sequence[FormatDriver]
    """The layers below the top one."""
    stands_on: Sequence[NodeEntry]
    foundation: FormatDriver | None
    backing: BackingSpec
    """As the top layer is told of what is below."""


class Reopen(Action):
    """What may be changed of one node becomes what is given, or the default: flags, cache, and what is below."""

    def __init__(self, control: Control, given: BlockdevOptions) -> None:
        self._control = control
        self._given = given
        self._before: _State | None = None
        self._opened: list[FormatDriver] = []
        """Layers that are new in the chain."""
        self._dropped: Sequence[FormatDriver] = ()
        """Layers that have left it."""

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
        self._control.jobs.check_free(entry)
        if given.read_only and self._is_written(entry):
            raise QmpError(f"Read-only block node '{entry.name}' cannot support read-write users")
        if not given.read_only and any(other.is_on(entry) for other in self._control.nodes):
            raise QmpError(f"Node '{entry.name}' is used as a backing file: it stays read-only")
        origin = node.top.origin
        if not isinstance(origin, Origin):
            raise QmpError(f"'{entry.name}': its file cannot be opened again")
        before = _State(
            node.read_only,
            node.unmap,
            node.detect_zeroes,
            entry.cache,
            node.layers[1:],
            [] if (below := entry.standing_on()) is None else [below],
            entry.foundation,
            origin.spec.backing,
        )
        cache = entry.cache if given.cache is None and entry.cache in _WRITETHROUGH else cache_mode(given)
        wanted = replace(
            before,
            read_only=given.read_only,
            unmap=given.discard == "unmap",
            detect_zeroes=given.detect_zeroes,
            cache=cache,
        )
        try:
            wanted = await self._with_backing(given, entry, wanted)
            await self._become(entry, wanted, before)
        except BaseException:
            await close_layers(self._opened)
            raise
        self._before = before

    async def _with_backing(self, given: _Reopened, entry: NodeEntry, state: _State) -> _State:
        """The layers that are to be below; new ones are open, and belong to this action."""
        if not isinstance(given, ImageOptions):
            return state
        top, name = entry.node.top, given.backing
        if "backing" not in given.model_fields_set:
            if state.below or top.backing is not None:
                raise QmpError(f"backing is missing for '{entry.name}'")
            return state
        if name is None:
            return replace(state, below=(), stands_on=(), foundation=None, backing=None)
        if not isinstance(name, str):
            raise QmpError("Cannot change the option 'backing.driver'")
        found = self._control.nodes.find(name)
        if found is None:
            raise QmpError(f"Cannot find device='' nor node-name='{name}'")
        if entry.is_on(found):
            return replace(state, below=entry.layers[entry.foundation_index :])
        if found is entry:
            index = next((number for number, layer in enumerate(entry.layers) if self._is_named(layer, name)), 0)
            if not index:
                raise QmpError(f"Making '{name}' a backing child of '{entry.name}' would create a cycle")
            return replace(state, below=entry.layers[index:])
        check_backing(found, name)
        if entry in _below(found):
            raise QmpError(f"Making '{name}' a backing child of '{entry.name}' would create a cycle")
        below = self._opened = await open_below(top, found)
        backing = ImageSpec(below[0].path, below[0].name)
        return replace(state, below=below, stands_on=[found], foundation=below[0], backing=backing)

    def _is_named(self, layer: FormatDriver, name: str) -> bool:
        return self._control.nodes.part_name(layer) == name

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

    async def _become(self, entry: NodeEntry, wanted: _State, before: _State) -> None:
        """Open the top layer again, over what is to be below it. Whatever fails, the node is as it was."""
        node, old = entry.node, entry.node.top
        origin = old.origin
        assert isinstance(origin, Origin)
        discard = "unmap" if wanted.unmap else "ignore"
        old.origin = replace(
            origin, spec=replace(origin.spec, discard=discard, cache=wanted.cache, backing=wanted.backing)
        )
        _set(node, wanted)
        try:
            await reopen(node, 0, read_only=wanted.read_only)
        except BaseException:
            _set(node, before)
            node.top.origin = origin
            raise
        entry.cache = wanted.cache
        entry.stand_on(wanted.stands_on, wanted.foundation)
        self._dropped = [layer for layer in before.below if layer not in wanted.below]

    async def abort(self) -> None:
        assert self._before is not None
        await self._become(self._entry, self._before, self._before)
        await close_layers(self._opened)

    async def finish(self) -> None:
        """Close what has left the chain."""
        await close_layers(self._dropped)


def _set(node: Node, state: _State) -> None:
    node.unmap, node.detect_zeroes = state.unmap, state.detect_zeroes
    node.replace_layers([node.top, *state.below])


def _below(entry: NodeEntry) -> list[NodeEntry]:
    """The nodes that it stands on, and those that they do."""
    return [below for each in entry.stands_on for below in (each, *_below(each))]


async def blockdev_reopen(control: Control, arguments: ReopenOptions) -> None:
    """Change all of the nodes, or none; the requests of their clients are held back meanwhile."""
    actions = [Reopen(control, given) for given in arguments.options]
    await execute(actions)
    for action in actions:
        await action.finish()


COMMANDS: Final = (Command("blockdev-reopen", blockdev_reopen, ReopenOptions),)
