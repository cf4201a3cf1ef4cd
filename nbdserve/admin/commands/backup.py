"""``blockdev-backup`` and ``drive-backup``: a disk as it is at one moment, copied to another node, or to a file."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Final, Literal

from nbdserve.admin.command import Command
from nbdserve.admin.commands.live import OnError
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Int
from nbdserve.admin.target_file import BASES, TargetFile, TargetMode
from nbdserve.admin.transaction import Action, execute
from nbdserve.block.node import Node
from nbdserve.block.window import map_node
from nbdserve.extents import UNALLOCATED, ZERO
from nbdserve.jobs.backup import Backup
from nbdserve.jobs.bitmap_sync import BitmapSync, check_modes, find_bitmap
from nbdserve.jobs.transaction import Transaction


class BackupCommon(Arguments):
    """What every backup is told. ``compress`` is accepted, and what is written is not compressed."""

    job_id: str | None = None
    device: str
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


class BackupOptions(BackupCommon):
    """Of ``blockdev-backup``."""

    target: str


class DriveBackup(BackupCommon):
    """Of ``drive-backup``."""

    target: str
    format: str | None = None
    mode: TargetMode = "absolute-paths"


class _StartBackup(Action):
    """The moment is that of the transaction."""

    def __init__(self, control: Control, arguments: BackupCommon, group: Transaction | None = None) -> None:
        """``group``: of jobs of which all end well, or none."""
        self.control = control
        self._arguments = arguments
        self._group = group
        self._job: Backup | None = None

    @property
    def source(self) -> NodeEntry:
        """The disk. QmpError when it is not there."""
        return self.control.nodes.either(self._arguments.device)

    def nodes(self) -> Sequence[Node]:
        return [self.source.node]

    @abstractmethod
    async def open_target(self) -> Node:
        """What is written."""

    @abstractmethod
    def check_target(self, target: Node) -> list[NodeEntry]:
        """QmpError when it may not be written. The named nodes it is made of, which the job uses."""

    async def give_up_target(self, target: Node) -> None:
        """Undo ``open_target``: there is no job. Else the job has closed what it owns."""

    async def prepare(self) -> None:
        target = await self.open_target()
        try:
            is_zero = await _reads_as_zero(target)
            self._make(target, is_zero)  # awaits nothing, so that what it checks is still so when it takes the nodes
        except BaseException:
            await self.give_up_target(target)
            raise

    def _make(self, target: Node, is_zero: bool) -> None:
        given, jobs, source = self._arguments, self.control.jobs, self.source
        targets = self.check_target(target)
        if target.size != source.node.size:
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
                target,
                sync=given.sync,
                work=bitmap if given.sync in ("bitmap", "incremental") else None,
                target_is_zero=is_zero,
                on_source_error=given.on_source_error,
                on_target_error=given.on_target_error,
                owns_target=not targets,
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
        jobs.add(job, source, *targets)
        self._job = job

    def commit(self) -> None:
        assert self._job is not None
        self._job.start()

    async def abort(self) -> None:
        assert self._job is not None
        self._job.force_cancel()
        await self._job.wait()


class BackupAction(_StartBackup):
    """``blockdev-backup``: to a node."""

    def __init__(self, control: Control, arguments: BackupOptions, group: Transaction | None = None) -> None:
        super().__init__(control, arguments, group)
        self._name = arguments.target

    async def open_target(self) -> Node:
        return self.control.nodes.either(self._name).node

    def check_target(self, target: Node) -> list[NodeEntry]:
        entry = self.control.nodes.either(self._name)
        if entry is self.source:
            raise QmpError("Source and target cannot be the same")
        self.control.jobs.check_target(entry, self.source)
        if entry.node is not target:
            raise QmpError(f"Node '{entry.name}' has become another while it was looked at")
        return [entry]


class DriveBackupAction(_StartBackup):
    """``drive-backup``: to an image that is made for it, or was before, and is closed when the job is over."""

    def __init__(self, control: Control, arguments: DriveBackup, group: Transaction | None = None) -> None:
        super().__init__(control, arguments, group)
        self._file = TargetFile(control, arguments.target, arguments.format, arguments.mode)
        self._sync = arguments.sync

    async def open_target(self) -> Node:
        source = self.source
        self.control.jobs.check_free(source)
        return await self._file.open(source, BASES.get(self._sync))

    def check_target(self, target: Node) -> list[NodeEntry]:
        self._file.check(self.source)
        return []

    async def give_up_target(self, target: Node) -> None:
        await target.close()
        await self._file.remove()

    async def abort(self) -> None:
        await super().abort()
        await self._file.remove()


async def _reads_as_zero(node: Node) -> bool:
    """Whether all of it does, as a new image."""
    async for part in map_node(node, 0, node.size):
        if not ((part.kind == ZERO) | (part.kind == UNALLOCATED)).all():
            return False
    return True


async def blockdev_backup(control: Control, arguments: BackupOptions) -> None:
    """The moment is that of the command."""
    await execute([BackupAction(control, arguments)])


async def drive_backup(control: Control, arguments: DriveBackup) -> None:
    """The same, to a file."""
    await execute([DriveBackupAction(control, arguments)])


COMMANDS: Final = (
    Command("blockdev-backup", blockdev_backup, BackupOptions),
    Command("drive-backup", drive_backup, DriveBackup),
)
