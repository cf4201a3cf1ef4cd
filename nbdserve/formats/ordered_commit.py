"""Group commit: how changes in memory reach the disk in an order that every crash survives, for any format.

One commit runs at a time and serves every ``flush`` that waits when it begins; a flush that arrives later waits for the
next. A commit copies, at one moment, what differs from the disk (``collect``, the driver's), and then writes it in
stages. Each stage is stable before the next one begins:

0. guest data, and what nothing on disk refers to yet (``Batch.hidden``: new tables);
1. and on, the driver's stages, each with a *barrier*: a function of the driver that makes the pieces stable, named for
   what it separates, whose docstring is its crash argument.

After the last one, what ``Batch.when_stable`` was given runs: host space that lost its mapping becomes free. If a stage
fails, all that it and the stages after it were to write counts as different from the disk again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol, TypeAlias

from nbdserve.formats.append_space import AppendSpace
from nbdserve.formats.group_run import FollowUp, GroupRun
from nbdserve.storage.base import ReadBuffer, Storage

_log: Final = logging.getLogger(__name__)

Piece: TypeAlias = tuple[int, ReadBuffer]
"""``(host_offset, bytes)`` to be written."""
Barrier: TypeAlias = Callable[[list[Piece]], Awaitable[None]]
"""Makes the pieces stable. Called only when there are some."""


class DirtySectors(Protocol):
    """A table that knows which of its 512-byte sectors differ from the disk."""

    dirty: set[int]

    def pieces(self, sectors: frozenset[int]) -> Sequence[Piece]:
        """The stored form of these sectors as they are now."""
        ...


@dataclass(slots=True)
class Stage:
    """Pieces that become stable together, in any order among themselves."""

    pieces: list[Piece] = field(default_factory=list)
    undo: list[Callable[[], object]] = field(default_factory=list)
    """Called if the stage is not known to be stable: mark what was to be written as different from the disk."""

    def add(self, pieces: Sequence[Piece], undo: Callable[[], object]) -> None:
        """Write ``pieces``."""
        self.pieces += pieces
        self.undo.append(undo)

    def add_dirty(self, table: DirtySectors) -> None:
        """Write the sectors of ``table`` that differ from the disk, which from now on count as written."""
        if table.dirty:
            sectors = frozenset(table.dirty)
            self.add(table.pieces(sectors), partial(table.dirty.update, sectors))
            table.dirty.clear()


class Batch:
    """What one commit writes: a copy of everything that differed from the disk at one moment."""

    def __init__(self) -> None:
        self.hidden = Stage()
        """What nothing on disk refers to yet; stable together with the guest data, before any other stage."""
        self.stages: list[tuple[Barrier, Stage]] = []
        self._when_stable: list[Callable[[], Awaitable[None]]] = []
        self._when_failed: list[Callable[[], object]] = []
        self._finally: list[Callable[[], object]] = []

    def stage(self, barrier: Barrier) -> Stage:
        """The next stage, made stable by ``barrier``."""
        stage = Stage()
        self.stages.append((barrier, stage))
        return stage

    def free(self, space: AppendSpace) -> None:
        """Units in the quarantine of ``space`` become free when the commit is complete."""
        if ranges := space.collect():
            self.when_stable(partial(space.release, ranges))
            self.when_failed(partial(space.restore, ranges))

    def when_stable(self, action: Callable[[], Awaitable[None]]) -> None:
        """Awaited after the last stage, when the flush has been answered; a failure is logged and loses space only."""
        self._when_stable.append(action)

    def when_failed(self, action: Callable[[], object]) -> None:
        """Called when any stage has failed."""
        self._when_failed.append(action)

    def finally_(self, action: Callable[[], object]) -> None:
        """Called at the end of the stages in any case (tables that were pinned for the commit are let go)."""
        self._finally.append(action)


class OrderedCommit:
    """Writes back the changes of one image."""

    def __init__(
        self,
        storage: Storage,
        collect: Callable[[Batch], None],
        *,
        data: Sequence[Storage] | None = None,
    ) -> None:
        """``storage`` holds the tables; ``data`` the guest data (default: ``storage`` too).

        ``collect`` fills a Batch with a copy of all that differs from the disk, and counts it as written.
        """
        self._storage = storage
        self._collect = collect
        self._data = [storage] if data is None else list(data)
        self._runs = GroupRun(self._run)

    async def commit(self) -> None:
        """Everything changed before this call, and the data behind it, is stable on return. OSError of the storage."""
        await self._runs.join()

    async def settle(self) -> None:
        """``commit``, and what follows it: space that it freed is free on return, and nothing is under way."""
        await self.commit()
        await self._runs.idle()

    async def _run(self) -> FollowUp:
        batch = Batch()
        await self._write(batch)
        return partial(self._follow_up, batch)

    async def _follow_up(self, batch: Batch) -> None:
        for action in batch._when_stable:
            try:
                await action()
            except Exception as error:
                _log.warning("%s: freed space stays unused while the image is open: %s", self._storage.path, error)

    async def _write(self, batch: Batch) -> None:
        done = 0
        try:
            self._collect(batch)
            await self._barrier_data(batch.hidden.pieces)
            done = 1
            for barrier, stage in batch.stages:
                if stage.pieces:
                    await barrier(stage.pieces)
                done += 1
        except BaseException:
            for stage in [batch.hidden, *(stage for _, stage in batch.stages)][done:]:
                for undo in stage.undo:
                    undo()
            for action in batch._when_failed:
                action()
            raise
        finally:
            for action in batch._finally:
                action()

    async def _barrier_data(self, hidden: list[Piece]) -> None:
        """Guest data, and tables that nothing refers to yet, are stable before anything on disk shows them.

        Crash before the barrier: the disk has the old mapping, and what was written is in space it does not use.
        Without it, an entry could show a block whose content was never written: another guest block's old bytes.
        """
        for data in self._data:
            if data is not self._storage or not hidden:
                await data.flush()
        if hidden:
            await self._storage.write_stable(hidden)
