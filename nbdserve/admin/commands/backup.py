"""``blockdev-backup``: a disk as it is at one moment, copied to another node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

from nbdserve.admin.command import Command
from nbdserve.admin.commands.live import OnError
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Int
from nbdserve.admin.transaction import Action, execute
from nbdserve.block.node import Node
from nbdserve.block.window import map_node
from nbdserve.extents import UNALLOCATED, ZERO
from nbdserve.jobs.backup import Backup
from nbdserve.jobs.bitmap_sync import BitmapSync, check_modes, find_bitmap
from nbdserve.jobs.transaction import Transaction


class BackupOptions(Arguments):
    """Of ``blockdev-backup``. ``compress`` is accepted, and what is written is not compressed."""

    job_id: str | None = None
    device: str
    target: str
    sync: Literal["top", "full", "none", "incremental", "bitmap"]
    speed: Int = 0
    bitmap: str | None = None
    bitmap_mode: Literal["on-success", "never", "always"] | None = None
    compress: bool = False
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"
    auto_finalize: bool = True
    auto_dismiss: bool = True
    filter_node_name: str | None = None


class BackupAction(Action):
    """The moment is that of the transaction."""

    def __init__(self, control: Control, arguments: BackupOptions, group: Transaction | None = None) -> None:
        """``group``: of jobs of which all end well, or none."""
        self._control = control
        self._arguments = arguments
        self._group = group
        self._job: Backup | None = None

    @property
    def _source(self) -> NodeEntry:
        return self._control.nodes.either(self._arguments.device)

    def nodes(self) -> Sequence[Node]:
        return [self._source.node]

    async def prepare(self) -> None:
        given, jobs = self._arguments, self._control.jobs
        is_zero = await _reads_as_zero(self._control.nodes.either(given.target).node)
        # Nothing is awaited from here on, so that what is checked is still so when the job takes its nodes.
        source, target = self._source, self._control.nodes.either(given.target)
        if source is target:
            raise QmpError("Source and target cannot be the same")
        jobs.check_target(target)
        if target.node.size != source.node.size:
            raise QmpError("Source and target image have different sizes")
        mode = check_modes(given.sync, given.bitmap, given.bitmap_mode)
        bitmaps = source.node.bitmaps
        bitmap = None if given.bitmap is None else find_bitmap(bitmaps, given.bitmap)
        identity = jobs.new_id(given.job_id, source)
        sync = None if bitmap is None or mode is None else BitmapSync(bitmaps, bitmap, mode)
        try:
            job = Backup(
                identity,
                source.node,
                target.node,
                sync=given.sync,
                work=bitmap if given.sync in ("bitmap", "incremental") else None,
                target_is_zero=is_zero,
                on_source_error=given.on_source_error,
                on_target_error=given.on_target_error,
                owns_target=False,
                finished=None if sync is None else sync.finish,
                speed=given.speed,
                auto_finalize=given.auto_finalize,
                auto_dismiss=given.auto_dismiss,
                transaction=self._group,
            )
        except BaseException:
            if sync is not None:
                sync.finish(False)
            raise
        jobs.add(job, source, target)
        self._job = job

    def commit(self) -> None:
        assert self._job is not None
        self._job.start()

    async def abort(self) -> None:
        assert self._job is not None
        self._job.force_cancel()
        await self._job.wait()


async def _reads_as_zero(node: Node) -> bool:
    """Whether all of it does, as a new image."""
    async for part in map_node(node, 0, node.size):
        if not ((part.kind == ZERO) | (part.kind == UNALLOCATED)).all():
            return False
    return True


async def blockdev_backup(control: Control, arguments: BackupOptions) -> None:
    """The moment is that of the command."""
    await execute([BackupAction(control, arguments)])


COMMANDS: Final = (Command("blockdev-backup", blockdev_backup, BackupOptions),)
