"""Commit: what upper layers hold is written into a layer below them, which then takes their place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from nbdserve.block.drain import uninterrupted
from nbdserve.block.lower import LowerNode
from nbdserve.block.node import Node
from nbdserve.block.reopening import close_to_writing, reopen
from nbdserve.errors import ImageError, JobError
from nbdserve.formats.base import BackingReference, FormatDriver
from nbdserve.jobs.live_copy import LiveCopy
from nbdserve.jobs.mirror import Mirror, NodeJob


def reference_to(layer: FormatDriver, above: FormatDriver, base: FormatDriver) -> BackingReference:
    """How ``layer`` names ``base``, which ``above`` names in its header so far, as ``above`` does where that holds."""
    known = above.backing
    if known is None:
        return BackingReference(str(Path(base.path).absolute()), base.name)
    if Path(known.name).is_absolute() or Path(above.path).parent == Path(layer.path).parent:
        return BackingReference(known.name, base.name)
    return BackingReference(str(Path(base.path).absolute()), base.name)


async def open_base(node: Node, index: int, size: int) -> LowerNode:
    """The layers of ``node`` from ``index`` down, open for writing, and at least ``size`` bytes long.

    ImageError or ConfigError when that layer cannot be written or cannot grow; it is then as it was.
    """
    base = node.layers[index]
    above = node.layers[index - 1]
    if not base.can("allocate") and not base.can("lookup_writable"):
        raise ImageError(base.path, f"{base.name} images cannot be written")
    if above.needs_open_backing and not above.can("set_backing"):
        raise ImageError(above.path, f"a {above.name} image refuses a backing file that was written to")
    return await uninterrupted(_open_base(node, index, size))


async def _open_base(node: Node, index: int, size: int) -> LowerNode:
    async with node.drained():
        if node.layers[index].read_only:
            await reopen(node, index, read_only=False)
    try:
        lower = LowerNode(node, index)
        if node.layers[index - 1].needs_open_backing:
            async with node.drained():
                await _renew_identity(node, index)
        if lower.size < size:
            await lower.resize(size)
            async with node.drained():
                node.replace_layers(node.layers)
    except BaseException:
        await close_base(node, index)
        raise
    return lower


async def close_base(node: Node, index: int) -> None:
    """Undo ``open_base``: nobody writes the layer any more."""
    if not node.layers[index].read_only:
        async with node.drained():
            await close_to_writing(node, index)


class ActiveCommit(Mirror):
    """Commit of a node's top layer, and of those between, into layer number ``base_index``, while clients write.

    Ready when the base has everything; ``complete`` makes it the top layer, and the layers above it are closed, as they
    were. Until then the chain reads as it always did, whatever the base holds.
    """

    type: ClassVar[str] = "commit"

    def __init__(self, id: str, node: Node, base_index: int = 1, **options: Any) -> None:
        """``options`` are those of ``Mirror`` and ``Job``."""
        if not 0 < base_index < len(node.layers):
            raise JobError("Image does not have a backing file")
        super().__init__(id, node, None, sync="top", base_index=base_index, owns_target=False, **options)
        self._pivoted = False

    async def begin(self) -> Node:
        """The base, open for writing."""
        return await open_base(self.node, self._base_index, self.node.size)

    async def pivot(self) -> None:
        """Make the base the top layer."""
        layers = self.node.layers
        self._dropped = layers[: self._base_index]
        self.node.replace_layers(layers[self._base_index :])
        self._pivoted = True

    async def clean(self) -> None:
        """Close the layers above, or the base to writing."""
        try:
            if not self._pivoted:
                await close_base(self.node, self._base_index)
        finally:
            await super().clean()


class Commit(NodeJob):
    """Commit of layers ``top_index`` to ``base_index - 1``, none of which is the top one, into layer ``base_index``.

    At the end the layer above them names the base as its backing file, and they are closed, as they were.
    """

    type: ClassVar[str] = "commit"

    def __init__(
        self,
        id: str,
        node: Node,
        top_index: int,
        base_index: int,
        *,
        backing: BackingReference | None = None,
        on_error: str = "report",
        **options: Any,
    ) -> None:
        """``backing``: how the layer above is to name the base, if not as found. ``options`` are those of ``Job``."""
        if not 0 < top_index < base_index < len(node.layers):
            raise JobError("the layers to commit must lie between the top one and the base")
        if not node.layers[top_index - 1].can("set_backing"):
            raise JobError(f"{node.layers[top_index - 1].name} images cannot be given another backing file")
        super().__init__(id, node, **options)
        self._top_index = top_index
        self._base_index = base_index
        self._reference = backing
        self._on_error = on_error
        self._target: LowerNode | None = None
        self._exchanged = False

    async def run(self) -> None:
        """Copy what the layers hold."""
        size = self.node.layers[self._top_index].size
        target = self._target = await open_base(self.node, self._base_index, size)
        source = LowerNode(self.node, self._top_index)
        copy = LiveCopy(
            self,
            source,
            target,
            source.size,
            on_source_error=self._on_error,
            on_target_error=self._on_error,
        )
        await copy.mark(above=self._base_index - self._top_index)
        while copy.remaining:
            await self.pause_point()
            await copy.sweep()
        if target.size > size:  # there the layers had nothing, and neither has the chain without them
            await target.zero(size, target.size - size)

    async def prepare(self) -> None:
        """Make the base stable, then let the layer above name it."""
        target = self._target
        assert target is not None
        await target.flush()
        await self.drain()
        top, base = self._top_index, self._base_index
        layers = self.node.layers
        reference = self._reference or reference_to(layers[top - 1], layers[base - 1], layers[base])
        self._dropped = await put_on(self.node, top - 1, base, reference)
        self._exchanged = True

    async def clean(self) -> None:
        """Close the base to writing, and the layers that have left."""
        try:
            await close_base(self.node, self._top_index if self._exchanged else self._base_index)
        finally:
            await super().clean()


async def put_on(node: Node, index: int, base_index: int, reference: BackingReference | None) -> Sequence[FormatDriver]:
    """Let layer ``index`` of the drained node stand on layer ``base_index``, or past the last on nothing.

    Its header names ``reference``; it is open for writing meanwhile if it is not. Returned are the layers between,
    which have left the chain.
    """
    read_only = node.layers[index].read_only
    layer = await reopen(node, index, read_only=False) if read_only else node.layers[index]
    try:
        layers = node.layers
        await layer.set_backing(reference, layers[base_index] if base_index < len(layers) else None)
        node.replace_layers([*layers[: index + 1], *layers[base_index:]])
    finally:
        if read_only:
            await close_to_writing(node, index)
    return layers[index + 1 : base_index]


async def _renew_identity(node: Node, index: int) -> None:
    """Layer ``index`` becomes another to those that know it by its identity; the layer above learns the new one.

    To be done before anything is written to it. Crash in between: the layer above refuses the one below, and
    ``image rebase -u`` says that it is the right one.
    """
    above = node.layers[index - 1]
    if above.backing is None:
        return
    read_only = above.read_only
    if read_only:
        above = await reopen(node, index - 1, read_only=False)
    try:
        base = node.layers[index]
        while base.size and base.lookup_writable(0, 1) is None:  # which is what a driver changes it at
            await base.load(0)
        try:
            above.accept_backing(base)
        except ImageError:
            await above.set_backing(above.backing, base)
    finally:
        if read_only:
            await close_to_writing(node, index - 1)
