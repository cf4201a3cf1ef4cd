"""The named nodes: disks that commands, exports and jobs refer to.

A name belongs to a whole chain. Its other layers, and the files, have names made up for queries (``#block012``), by
which a command may mean a layer of a chain.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Final
from weakref import WeakKeyDictionary

from nbdserve.admin.errors import WELL_FORMED, QmpError
from nbdserve.admin.moments import Moment
from nbdserve.admin.objects import ObjectEntry
from nbdserve.block.node import Node
from nbdserve.formats.base import FormatDriver
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage

MAX_NAME: Final = 31
_MOMENT_FILTERS: Final = ("copy-before-write", "snapshot-access")
_UNFIT: Final = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(eq=False)
class NodeEntry:
    """One named node. Who ``users`` are keeps it from being deleted: ``export 'x'``, ``node 'y'``, ``job 'z'``."""

    name: str
    driver: str
    node: Node
    cache: str = "writeback"
    users: list[str] = field(default_factory=list)
    children: list[NodeEntry] = field(default_factory=list)
    """Other named nodes it is made of, which it uses."""
    inner_names: dict[str, FormatDriver | Storage] = field(default_factory=dict)
    """Names given to layers and files that have no entry of their own."""
    is_filter: bool = False
    """It shows the disk of its first child."""
    inner: Node | None = None
    """The disk below a filter that was described with it, and has no entry of its own."""
    moment: Moment | None = None
    """What a ``copy-before-write`` node keeps; its node is that of the disk, which is not its own to close."""
    objects: list[ObjectEntry] = field(default_factory=list)
    """Objects it uses."""
    stands_on: list[NodeEntry] = field(default_factory=list)
    """The node whose images are below its own since it was opened again: at most one."""
    foundation: FormatDriver | None = None
    """The first of those; when it has left the chain, so has that node."""
    permanent: bool = False
    """Opened at the start: not to be deleted."""

    @property
    def layers(self) -> list[FormatDriver]:
        """The chain, top first."""
        return (self.inner or self.node).layers

    @property
    def label(self) -> str:
        """What it is to those it uses."""
        return f"node '{self.name}'"

    def announce(self) -> None:
        """It uses what it is made of from now on."""
        for users in self._used():
            users.append(self.label)

    def _used(self) -> list[list[str]]:
        entries = [*self.children, *self.stands_on]
        return [entry.users for entry in entries] + [used.users for used in self.objects]

    def stand_on(self, below: Sequence[NodeEntry], foundation: FormatDriver | None) -> None:
        """Let go of what was below, and use this, whose images are below now: ``foundation`` is the first of them."""
        for entry in self.stands_on:
            entry.users.remove(self.label)
        self.stands_on = list(below)
        self.foundation = foundation
        for entry in below:
            entry.users.append(self.label)

    def standing_on(self) -> NodeEntry | None:
        """The node whose images are below, as far as no job has changed that."""
        if self.stands_on and self.foundation not in self.layers:
            self.stand_on((), None)
        return self.stands_on[0] if self.stands_on else None

    def is_on(self, entry: NodeEntry) -> bool:
        """Whether it stands on ``entry``."""
        return self.standing_on() is entry

    @property
    def foundation_index(self) -> int:
        """The number of the first layer that belongs to the node it stands on."""
        assert self.foundation is not None
        return self.layers.index(self.foundation)

    def index_of(self, found: NodeEntry, index: int) -> int | None:
        """The number here of layer ``index`` of ``found``, which is this node or one of those it stands on."""
        if found is self:
            return index
        below = self.standing_on()
        at = None if below is None else below.index_of(found, index)
        return None if at is None else self.foundation_index + at

    def is_made_of(self, other: NodeEntry) -> bool:
        """Whether it is ``other``, or that is somewhere below: what is written to the one changes the other."""
        return self is other or any(below.is_made_of(other) for below in (*self.children, *self.stands_on))

    def inherit(self, gone: NodeEntry) -> None:
        """Use what ``gone`` is made of, which is not a node of its own any more."""
        for child in gone.children:
            child.users.remove(gone.label)
            child.users.append(self.label)
        self.children += gone.children
        gone.children = []

    async def close(self) -> None:
        """Close what it has opened, and let go of its children."""
        for users in self._used():
            users.remove(self.label)
        if self.moment is None:
            await self.node.close()
        else:
            self.moment.close()


class NodeTable:
    """The named nodes, in order of creation."""

    def __init__(self) -> None:
        self._entries: dict[str, NodeEntry] = {}
        self._made_up: WeakKeyDictionary[FormatDriver | Storage, str] = WeakKeyDictionary()
        self._numbers = count(100)

    def __iter__(self) -> Iterator[NodeEntry]:
        return iter(list(self._entries.values()))

    def check_name(self, name: str) -> None:
        """QmpError when no new node may have this name."""
        if not WELL_FORMED.fullmatch(name):
            raise QmpError(f"Invalid node-name: '{name}'")
        if len(name) > MAX_NAME:
            raise QmpError("Node name too long")
        if self.find(name) is not None:
            raise QmpError(f"Duplicate nodes with node-name='{name}'")

    def add(self, entry: NodeEntry) -> None:
        """``entry`` is known from now on."""
        for name in (entry.name, *entry.inner_names):
            self.check_name(name)
        self._entries[entry.name] = entry
        for name, part in entry.inner_names.items():
            self._made_up[part] = name
        if not entry.is_filter:
            (entry.inner or entry.node).tell_reopened = self.renew

    def fitting_name(self, text: str) -> str:
        """A name that is free, as near to ``text`` as may be."""
        name = _UNFIT.sub("-", text)
        if not name[:1].isalpha():
            name = f"disk{name}" if name[:1] in "-._" else f"disk-{name}" if name else "disk"
        name = name[:MAX_NAME]
        for number in count(1):
            if self.find(name) is None:
                break
            suffix = f"-{number}"
            name = name[: MAX_NAME - len(suffix)] + suffix
        return name

    def find(self, name: str) -> NodeEntry | None:
        """The node, or the one whose layer or file has this name."""
        if name in self._entries:
            return self._entries[name]
        return next((entry for entry in self if name in dict(self.parts(entry))), None)

    def get(self, name: str | None = None, device: str | None = None) -> NodeEntry:
        """The node meant by ``node-name`` or ``device``; QmpError when there is none."""
        wanted = (name if name is not None else device) or ""
        entry = self._entries.get(wanted) or self._by_top_layer(wanted)
        if entry is not None:
            return entry
        raise QmpError(f"Cannot find device='{device or ''}' nor node-name='{name or ''}'")

    def _by_top_layer(self, name: str) -> NodeEntry | None:
        return next((each for each in self if each.inner_names.get(name) is each.node.top), None)

    def either(self, name: str) -> NodeEntry:
        """The node meant by a member that takes a device as well as a node."""
        return self.get(name, name)

    def filters_on(self, entry: NodeEntry) -> list[NodeEntry]:
        """The filters that keep or show moments of ``entry``, also those over others."""
        direct = [other for other in self if other.driver in _MOMENT_FILTERS and entry in other.children[:1]]
        return direct + [above for other in direct for above in self.filters_on(other)]

    def move_filters(self, old: NodeEntry, new: NodeEntry) -> None:
        """The filters on ``old`` are on ``new``, which has its node now."""
        for entry in self:
            if entry.is_filter and entry not in (old, new) and old in entry.children:
                entry.children = [new if child is old else child for child in entry.children]
                old.users.remove(entry.label)
                new.users.append(entry.label)

    def name_part(self, entry: NodeEntry, name: str, part: FormatDriver | Storage) -> None:
        """Give a layer or file of the chain a name that is free; that of the top layer means the node."""
        self.check_name(name)
        entry.inner_names[name] = part
        self._made_up[part] = name

    def absorb(self, entry: NodeEntry, overlay: NodeEntry) -> None:
        """The layer of ``overlay`` is the top one of ``entry`` now, and its names mean that."""
        entry.inherit(overlay)
        del self._entries[overlay.name]
        entry.inner_names |= overlay.inner_names
        self.name_part(entry, overlay.name, entry.node.top)

    async def absorb_below(self, entry: NodeEntry, below: NodeEntry) -> None:
        """``entry`` stands on ``below``, whose names mean layers and files of ``entry`` from now on."""
        start = entry.foundation_index
        pairs = list(zip(below.layers, entry.layers[start:], strict=False))
        del self._entries[below.name]
        entry.inner_names |= below.inner_names
        for old, new in pairs:
            self.renew(old, new)
        self.name_part(entry, below.name, entry.layers[start])
        deeper = below.standing_on()
        foundation = None if deeper is None else entry.layers[start + below.foundation_index]
        entry.stand_on([] if deeper is None else [deeper], foundation)
        entry.inherit(below)
        await below.close()

    def renew(self, old: FormatDriver, new: FormatDriver) -> None:
        """A layer of a chain has been opened again: its names, and those of its file, stay."""
        for before, after in ((old, new), (old.storage, new.storage)):
            name = self._made_up.pop(before, None)
            if name is not None:
                self._made_up[after] = name
                for entry in self:
                    if name in entry.inner_names:
                        entry.inner_names[name] = after
        for entry in self:
            if entry.foundation is old:
                entry.foundation = new

    def moments_of(self, node: Node) -> list[Moment]:
        """The moments of the disk that are kept."""
        return [entry.moment for entry in self if entry.moment is not None and entry.node is node]

    def layer(self, name: str) -> tuple[NodeEntry, int]:
        """The chain and the index of the layer meant by ``name``."""
        for entry in self:
            if entry.name == name:
                return entry, 0
            if entry.is_filter:
                continue
            for index, layer in enumerate(entry.node.layers):
                if self.part_name(layer) == name:
                    return entry, index
        raise QmpError(f"Cannot find device='{name}' nor node-name='{name}'")

    def part_name(self, part: FormatDriver | Storage) -> str:
        """The name of a layer or file, made up when it is first asked for."""
        name = self._made_up.get(part)
        if name is None:
            name = self._made_up[part] = f"#block{next(self._numbers)}"
        return name

    def parts(self, entry: NodeEntry) -> Iterator[tuple[str, FormatDriver | Storage]]:
        """The layers and files of a chain, with their names; the top layer is the node itself."""
        if entry.is_filter:
            return
        for index, layer in enumerate(entry.layers):
            if index or entry.inner is not None or self._made_up.get(layer) in entry.inner_names:
                yield self.part_name(layer), layer
            if isinstance(layer.storage, FileStorage):
                yield self.part_name(layer.storage), layer.storage

    def remove(self, name: str) -> NodeEntry:
        """Take the node out, to be closed. QmpError when it is in use, or not the client's to delete."""
        entry = self._entries.get(name)
        if entry is None:
            if self.find(name) is not None:
                raise QmpError(f"Node {name} is not owned by the monitor")
            raise QmpError(f"Failed to find node with node-name='{name}'")
        if entry.permanent:
            raise QmpError(f"Node {name} is not owned by the monitor")
        for other in self:
            if other.is_on(entry):
                raise QmpError(f"Node '{name}' is busy: node is used as backing hd of '{other.name}'")
        if any(user.startswith("node ") for user in entry.users):
            raise QmpError(f"Block device {name} is in use")
        if entry.users:
            raise QmpError(f"Node {name} is in use")
        return self._entries.pop(name)

    async def close(self) -> None:
        """Close every node that was not there at the start; the first error is raised after all are closed."""
        errors: list[Exception] = []
        for entry in reversed([entry for entry in self if not entry.permanent]):
            del self._entries[entry.name]
            try:
                await entry.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
