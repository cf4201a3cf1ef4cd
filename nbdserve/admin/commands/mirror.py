"""``blockdev-mirror`` and ``drive-mirror``: a disk copied to a node or a file, which may then take its place."""

from __future__ import annotations

from typing import Final, Literal

from nbdserve.admin.command import Command
from nbdserve.admin.commands.live import OnError, job_options
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Int, Uint32
from nbdserve.admin.target_file import BASES, TargetFile, TargetMode
from nbdserve.block.node import Node
from nbdserve.jobs.live_copy import GRANULARITY
from nbdserve.jobs.mirror import Mirror
from nbdserve.units import is_power_of_two


class MirrorCommon(Arguments):
    """What every mirror is told."""

    job_id: str | None = None
    device: str
    target: str
    sync: Literal["top", "full", "none"]
    speed: Int = 0
    granularity: Uint32 = GRANULARITY
    on_source_error: OnError = "report"
    on_target_error: OnError = "report"
    copy_mode: Literal["background"] = "background"
    auto_finalize: bool = True
    auto_dismiss: bool = True


class Mirroring(MirrorCommon):
    """Of ``blockdev-mirror``."""

    filter_node_name: str | None = None


class DriveMirror(MirrorCommon):
    """Of ``drive-mirror``. ``node_name``: what the image is called when it has become the top layer of the disk."""

    format: str | None = None
    node_name: str | None = None
    mode: TargetMode = "absolute-paths"
    unmap: bool = True


async def blockdev_mirror(control: Control, arguments: Mirroring) -> None:
    """Copy a disk to another node, and keep that equal; ``complete`` puts it in the place of the disk."""
    entry, target = control.nodes.either(arguments.device), control.nodes.either(arguments.target)
    if entry is target:
        raise QmpError("Can't mirror node into itself")
    for each in (entry, target):
        if each.moment is not None:
            raise QmpError(f"Node '{each.name}' is a filter: mirror the disk below it")
    _check(arguments)
    control.jobs.check_target(target, entry)
    job = _mirror(control, arguments, entry, target.node, owned=False)
    control.jobs.add(job, entry, target, succeeded=lambda: _swapped(control, job, entry, target))
    job.start()


def _swapped(control: Control, job: Mirror, entry: NodeEntry, target: NodeEntry) -> None:
    """After ``complete`` the clients' node has the layers of the target: it has the target's name from then on."""
    if job.complete_requested:
        entry.node, target.node = target.node, entry.node
        entry.permanent, target.permanent = target.permanent, entry.permanent
        control.exports.move(entry, target)
        control.nodes.move_filters(entry, target)


async def drive_mirror(control: Control, arguments: DriveMirror) -> None:
    """The same to an image that is made for it, or was before; the disk keeps its name when it takes its place."""
    entry = control.nodes.either(arguments.device)
    _check(arguments)
    if arguments.sync == "none" and arguments.mode != "existing":
        raise QmpError("'sync': 'none' makes an image over the disk it would replace: give mode 'existing'")
    if arguments.node_name is not None:
        control.nodes.check_name(arguments.node_name)
    if entry.is_filter or entry.inner is not None:
        raise QmpError(f"Node '{entry.name}' is a filter: mirror the disk below it")
    control.jobs.new_id(arguments.job_id, entry)
    file = TargetFile(control, arguments.target, arguments.format, arguments.mode)
    target = await file.open(entry, BASES.get(arguments.sync))
    try:
        file.check(entry)
        job = _mirror(control, arguments, entry, target, owned=True)
        control.jobs.add(job, entry, succeeded=lambda: _replaced(control, job, entry, arguments.node_name))
    except BaseException:
        await target.close()
        await file.remove()
        raise
    job.start()


def _replaced(control: Control, job: Mirror, entry: NodeEntry, name: str | None) -> None:
    """After ``complete`` the disk has the layers of the image; the names of its old ones mean nothing any more, and the
    nodes they were made of are free."""
    if job.complete_requested:
        entry.driver = entry.node.format
        entry.inner_names = {}
        for child in entry.children:
            child.users.remove(entry.label)
        entry.children = []
        if name is not None and control.nodes.find(name) is None:
            control.nodes.name_part(entry, name, entry.node.top)


def _check(arguments: MirrorCommon) -> None:
    if not (512 <= arguments.granularity <= 64 << 20 and is_power_of_two(arguments.granularity)):
        raise QmpError("Parameter 'granularity' expects a value in range [512B, 64MB]")


def _mirror(control: Control, arguments: MirrorCommon, entry: NodeEntry, target: Node, *, owned: bool) -> Mirror:
    """The job, which is not known yet. QmpError, JobError."""
    return Mirror(
        control.jobs.new_id(arguments.job_id, entry),
        entry.node,
        target,
        sync=arguments.sync,
        granularity=arguments.granularity,
        on_source_error=arguments.on_source_error,
        on_target_error=arguments.on_target_error,
        owns_target=owned,
        **job_options(arguments),
    )


COMMANDS: Final = (
    Command("blockdev-mirror", blockdev_mirror, Mirroring),
    Command("drive-mirror", drive_mirror, DriveMirror),
)
