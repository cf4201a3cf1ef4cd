"""Conversion: the content of one disk, or of several behind each other, into another image."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from nbdserve.block.node import Node
from nbdserve.jobs.copy import Copy, CopyOptions, Target
from nbdserve.jobs.job import Job
from nbdserve.jobs.stretches import Stretch, in_units, skipping_zeroes, stretches
from nbdserve.storage.file import FileStorage


@dataclass(frozen=True, slots=True)
class CommonBase:
    """What source and target have below them."""

    above: int
    """The layers of the source before this one are copied."""
    size: int
    """The length of the target's base: what follows it reads as zeroes there."""


def layers_above(node: Node, identity: tuple[int, int]) -> int:
    """How many layers of ``node`` lie above the file ``identity``.

    If it is none of them it is taken to be a copy of what lies below the top layer; a disk of one layer is copied
    whole.
    """
    for number, layer in enumerate(node.layers):
        if number and isinstance(layer.storage, FileStorage) and layer.storage.identity == identity:
            return number
    return 1


class ConvertJob(Job):
    """Copies ``sources`` to ``target``, one behind the other."""

    type: ClassVar[str] = "convert"

    def __init__(
        self,
        id: str,
        sources: Sequence[Node],
        target: Target,
        options: CopyOptions,
        *,
        base: CommonBase | None = None,
        window: tuple[int, int] | None = None,
        speed: int = 0,
    ) -> None:
        """``window``: the start and end of what is copied of the one source there is, to the start of the target."""
        super().__init__(id, speed=speed)
        self._window = window
        self._sources = sources
        self._target = target
        self._options = replace(options, progress=self._advance)
        self._base = base
        self.total_progress = sum(node.size for node in sources) if window is None else window[1] - window[0]

    def _advance(self, length: int) -> None:
        self.current_progress += length

    async def run(self) -> None:
        """Copy."""
        if self._window is not None:
            start, end = self._window
            await self._part(self._sources[0], start, end, -start, None)
            return
        shift = 0
        for node in self._sources:
            split = node.size if self._base is None else min(node.size, self._base.size)
            above = None if self._base is None else self._base.above
            await self._part(node, 0, split, shift, above)
            await self._part(node, split, node.size, shift, None, behind=True)
            shift += node.size

    async def _part(
        self, node: Node, start: int, end: int, shift: int, above: int | None, *, behind: bool = False
    ) -> None:
        """Copy ``[start, end)`` of a source; ``behind``: it lies behind the end of the target's base."""
        if start == end:
            return
        what: AsyncIterator[Stretch] = stretches(node, start, end, above=above)
        if behind:
            what = skipping_zeroes(what)
        # Without a base, where allocation is to be as QEMU's, whole units are copied: parts are no less work.
        if self._options.compress is not None or (self._base is None and self._options.sparse):
            what = in_units(what, self._options.unit, node.size)
        await Copy(node, self._target, self._options, pace=self, shift=shift).run(what)
