"""Mirror: a disk copied to another while clients change it, until both are equal; then the other may take its place."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any, ClassVar, Final

from nbdserve.block.node import Node
from nbdserve.errors import JobError, RequestError
from nbdserve.formats.base import FormatDriver
from nbdserve.jobs.job import Job
from nbdserve.jobs.live_copy import CHUNK, GRANULARITY, LiveCopy
from nbdserve.jobs.status import JobStatus
from nbdserve.units import MIB

_NEARLY: Final = 16 * MIB
"""With less than this to copy the two count as equal: the rest is copied while clients wait, well below a second."""
_PASSES: Final = 8
"""Tries to come that near; clients who write faster than the copy wait longer at the end."""
_LOOK_SECONDS: Final = 0.1


class NodeJob(Job):
    """A job that has one node to itself, as far as jobs go."""

    def __init__(self, id: str, node: Node, **options: Any) -> None:
        """``options`` are those of ``Job``. JobError when another job works on the node."""
        if node.busy_with:
            raise JobError(f"Node '{node.path}' is busy: block device is in use by block job: {node.busy_with}")
        super().__init__(id, **options)
        self.node = node
        node.busy_with = self.type
        self._dropped: Sequence[FormatDriver] = ()
        """Layers that have left the chain, to be closed."""
        self._held = AsyncExitStack()
        """What is held from ``prepare`` to ``clean``: clients, while the job exchanges the layers they use."""

    async def drain(self) -> None:
        """Hold the node's requests back until ``clean``. From ``prepare`` on, whose task is that of ``clean``."""
        await self._held.enter_async_context(self.node.drained())

    async def clean(self) -> None:
        """Let clients go on, and close what has left the chain."""
        self.node.busy_with = ""
        await self._held.aclose()
        for layer in self._dropped:
            with contextlib.suppress(OSError, RequestError):  # nothing of the disk is in it any more
                await layer.close()


class Mirror(NodeJob):
    """Copies ``node`` to ``target``; ready when both are equal, and kept so.

    ``complete``: the layers of ``target`` take the place of those of ``node``, under its clients, and ``target`` has
    the old ones. ``cancel`` without force, once ready: ``target`` is the disk at that moment, and ``node`` stays as it
    is. In every other case of an end ``node`` is as if nothing had been, and what is in ``target`` means nothing.
    """

    type: ClassVar[str] = "mirror"
    completes: ClassVar[bool] = True

    def __init__(
        self,
        id: str,
        node: Node,
        target: Node | None,
        *,
        sync: str = "full",
        base_index: int = 1,
        target_is_zero: bool = False,
        granularity: int = GRANULARITY,
        on_source_error: str = "report",
        on_target_error: str = "report",
        auto_complete: bool = False,
        pivot: bool = True,
        owns_target: bool = True,
        **options: Any,
    ) -> None:
        """``sync``: what is copied besides what changes from now on: ``full``; ``top``, what the layers above number
        ``base_index`` hold; ``none``.

        ``target_is_zero``: it reads as zeroes, so that those are not copied. ``auto_complete``: complete when ready.
        ``pivot`` False: complete without the exchange. ``owns_target``: it is closed at the end, or its new layers
        are. ``options`` are those of ``Job``.
        """
        if target is not None and target.size != node.size:
            raise JobError("Source and target image have different sizes")
        super().__init__(id, node, **options)
        self._target = target
        self._sync = sync
        self._base_index = base_index
        self._target_is_zero = target_is_zero
        self._granularity = min(granularity, CHUNK)
        self._on_error = (on_source_error, on_target_error)
        self._auto_complete = auto_complete
        self._owns_target = owns_target
        self._exchanges = pivot
        self._copy: LiveCopy | None = None

    async def begin(self) -> Node:
        """The target, ready to be written."""
        assert self._target is not None
        return self._target

    async def run(self) -> None:
        """Copy until complete or cancel is asked for, and both are equal."""
        target = await self.begin()
        self._target = target
        copy = self._copy = LiveCopy(
            self,
            self.node,
            target,
            self.node.size,
            on_source_error=self._on_error[0],
            on_target_error=self._on_error[1],
            granularity=self._granularity,
        )
        async with self.node.drained():
            self.node.watch(copy)
        if self._sync != "none":
            above = self._base_index if self._sync == "top" else None
            await copy.mark(above=above, zeroes=above is not None or not self._target_is_zero)
        passes = 0
        while passes == 0 or copy.troubled or (copy.remaining > _NEARLY and passes < _PASSES):
            await self.pause_point()
            await copy.sweep()
            passes += 1
        await self.pause_point()
        self.become_ready()
        while not (self._auto_complete or self.complete_requested or self.cancel_requested):
            await self.sleep(_LOOK_SECONDS)
            await copy.sweep()

    def on_cancel(self, force: bool) -> bool:
        """Once ready, ``cancel`` without force ends the job well, without the exchange."""
        return self.status not in (JobStatus.READY, JobStatus.STANDBY, JobStatus.WAITING, JobStatus.PENDING)

    async def prepare(self) -> None:
        """Copy the last changes while clients wait."""
        copy, target = self._copy, self._target
        assert copy is not None
        assert target is not None
        copy.finish()
        for _ in range(_PASSES):
            if copy.remaining <= _NEARLY:
                break
            await copy.sweep()
        await self.drain()
        while copy.remaining:
            await copy.sweep()
        await target.flush()

    async def commit(self) -> None:
        """Exchange the layers, if that was asked for."""
        if self._exchanges and (self.complete_requested or (self._auto_complete and not self.cancel_requested)):
            await self.pivot()

    async def pivot(self) -> None:
        """Give the target's layers to the node."""
        target = self._target
        assert target is not None
        layers, old = list(target.layers), list(self.node.layers)
        self.node.replace_layers(layers)
        async with target.drained():
            target.replace_layers(old)

    async def clean(self) -> None:
        """Watch no more; the node's clients go on."""
        if self._copy is not None:
            self.node.unwatch(self._copy)
        await super().clean()
        if self._owns_target and self._target is not None:
            await self._target.close()
