"""Dirty bitmaps. They are kept in memory, also those that are said to be persistent."""

from __future__ import annotations

import asyncio
import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final, TypeAlias

from pydantic import Tag

from nbdserve.admin.blockdev import BitmapName
from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Result, Uint32, alternate
from nbdserve.admin.transaction import Action, execute
from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.bitmaps.bits import Bits
from nbdserve.block.node import Node


class BitmapAdd(Arguments):
    """Of ``block-dirty-bitmap-add``."""

    node: str
    name: str
    granularity: Uint32 | None = None
    persistent: bool = False
    disabled: bool = False


BitmapOrName: TypeAlias = Annotated[
    Annotated[str, Tag("=text")] | Annotated[BitmapName, Tag("=object")], alternate("BlockDirtyBitmapOrStr")
]


class BitmapMerge(Arguments):
    """Of ``block-dirty-bitmap-merge``."""

    node: str
    target: str
    bitmaps: list[BitmapOrName]


class BitmapDigest(Result):
    """Of ``x-debug-block-dirty-bitmap-sha256``."""

    sha256: str


class _OnBitmaps(Action):
    """An action on the bitmaps of one node."""

    def __init__(self, control: Control, node: str) -> None:
        self._control = control
        self._name = node

    @property
    def entry(self) -> NodeEntry:
        """The node."""
        return self._control.nodes.either(self._name)

    def nodes(self) -> Sequence[Node]:
        return [self.entry.node]

    def _note_since(self, bitmap: DirtyBitmap) -> None:
        """A bitmap that begins now begins with the moments of the disk that are kept already.

        A backup of such a moment does not have what has changed since, so the next one must.
        """
        for moment in self._control.nodes.moments_of(self.entry.node):
            bitmap.absorb(moment.since)


class Add(_OnBitmaps):
    """``block-dirty-bitmap-add``."""

    def __init__(self, control: Control, arguments: BitmapAdd) -> None:
        super().__init__(control, arguments.node)
        self._arguments = arguments
        self._added: DirtyBitmap | None = None

    async def prepare(self) -> None:
        wanted, entry = self._arguments, self.entry
        bitmaps = entry.node.bitmaps
        if wanted.persistent and (entry.node.format != "qcow2" or entry.is_filter):
            raise QmpError(f"Can't store persistent bitmaps to {entry.name}: Operation not supported")
        granularity = bitmaps.default_granularity if wanted.granularity is None else wanted.granularity
        self._added = bitmaps.add(wanted.name, granularity)
        self._note_since(self._added)
        self._added.persistent, self._added.disabled = wanted.persistent, wanted.disabled

    async def abort(self) -> None:
        assert self._added is not None
        self.entry.node.bitmaps.discard(self._added)


class _OnBitmap(_OnBitmaps):
    """An action on one bitmap."""

    def __init__(self, control: Control, arguments: BitmapName) -> None:
        super().__init__(control, arguments.node)
        self._bitmap_name = arguments.name

    @property
    def bitmap(self) -> DirtyBitmap:
        """It; QmpError when there is none."""
        return self.entry.node.bitmaps.get(self._bitmap_name)

    async def prepare(self) -> None:
        self.act(self.bitmap)

    @abstractmethod
    def act(self, bitmap: DirtyBitmap) -> None:
        """Do it."""


class Clear(_OnBitmap):
    """``block-dirty-bitmap-clear``."""

    _before: Bits

    def act(self, bitmap: DirtyBitmap) -> None:
        bitmap.check_usable()
        self._before = bitmap.clear()
        self._note_since(bitmap)

    async def abort(self) -> None:
        self.bitmap.restore(self._before)


class Switch(_OnBitmap):
    """``block-dirty-bitmap-enable`` and ``-disable``."""

    disabled: ClassVar[bool]
    _before: bool

    def act(self, bitmap: DirtyBitmap) -> None:
        bitmap.check_usable(reading=True)
        self._before, bitmap.disabled = bitmap.disabled, self.disabled

    async def abort(self) -> None:
        self.bitmap.disabled = self._before


class Enable(Switch):
    """It records."""

    disabled = False


class Disable(Switch):
    """It does not."""

    disabled = True


class Remove(_OnBitmap):
    """``block-dirty-bitmap-remove``. One that is inconsistent can be removed as well."""

    _removed: DirtyBitmap

    def act(self, bitmap: DirtyBitmap) -> None:
        if not bitmap.inconsistent:
            bitmap.check_usable()
        self._removed = bitmap
        bitmap.busy = True  # nothing that follows in the transaction may use it

    def commit(self) -> None:
        self._removed.busy = False
        self.entry.node.bitmaps.discard(self._removed)

    async def abort(self) -> None:
        self._removed.busy = False


class Merge(_OnBitmaps):
    """``block-dirty-bitmap-merge``."""

    _before: Bits

    def __init__(self, control: Control, arguments: BitmapMerge) -> None:
        super().__init__(control, arguments.node)
        self._arguments = arguments

    def _sources(self) -> list[tuple[NodeEntry, str]]:
        either = self._control.nodes.either
        return [
            (self.entry, given) if isinstance(given, str) else (either(given.node), given.name)
            for given in self._arguments.bitmaps
        ]

    def nodes(self) -> Sequence[Node]:
        return [self.entry.node, *(entry.node for entry, _ in self._sources())]

    @property
    def target(self) -> DirtyBitmap:
        """What is merged into."""
        return self.entry.node.bitmaps.get(self._arguments.target)

    async def prepare(self) -> None:
        target = self.target
        sources = [entry.node.bitmaps.get(name) for entry, name in self._sources()]
        self._before = target.snapshot()
        try:
            for source in sources:
                target.merge(source)
        except BaseException:
            target.restore(self._before)
            raise

    async def abort(self) -> None:
        self.target.restore(self._before)


async def bitmap_add(control: Control, arguments: BitmapAdd) -> None:
    """A new bitmap, which records every change from here on."""
    await execute([Add(control, arguments)])


async def bitmap_remove(control: Control, arguments: BitmapName) -> None:
    """Forget it."""
    await execute([Remove(control, arguments)])


async def bitmap_clear(control: Control, arguments: BitmapName) -> None:
    """All is clean."""
    await execute([Clear(control, arguments)])


async def bitmap_enable(control: Control, arguments: BitmapName) -> None:
    """Record."""
    await execute([Enable(control, arguments)])


async def bitmap_disable(control: Control, arguments: BitmapName) -> None:
    """Record no more."""
    await execute([Disable(control, arguments)])


async def bitmap_merge(control: Control, arguments: BitmapMerge) -> None:
    """What is dirty in others is dirty in this one."""
    await execute([Merge(control, arguments)])


async def bitmap_sha256(control: Control, arguments: BitmapName) -> BitmapDigest:
    """For tests: equal digests are equal bitmaps."""
    entry = control.nodes.find(arguments.node)
    if entry is None:
        raise QmpError(f"Node '{arguments.node}' not found")
    bits = entry.node.bitmaps.get(arguments.name).snapshot()
    digest = await asyncio.to_thread(hashlib.sha256, bits.octets or bytes(8))  # QEMU has one word at least
    return BitmapDigest(sha256=digest.hexdigest())


COMMANDS: Final = (
    Command("x-debug-block-dirty-bitmap-sha256", bitmap_sha256, BitmapName, BitmapDigest),
    Command("block-dirty-bitmap-add", bitmap_add, BitmapAdd),
    Command("block-dirty-bitmap-remove", bitmap_remove, BitmapName),
    Command("block-dirty-bitmap-clear", bitmap_clear, BitmapName),
    Command("block-dirty-bitmap-enable", bitmap_enable, BitmapName),
    Command("block-dirty-bitmap-disable", bitmap_disable, BitmapName),
    Command("block-dirty-bitmap-merge", bitmap_merge, BitmapMerge),
)
