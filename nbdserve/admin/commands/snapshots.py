"""External snapshots: a new layer takes the writes, and what was there stays as it is."""

from __future__ import annotations

from typing import Final, Literal

from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.schema import Arguments
from nbdserve.jobs.snapshot import create_overlay, snapshot
from nbdserve.storage.roots import ImageRoots


class SnapshotSync(Arguments):
    """Of ``blockdev-snapshot-sync``."""

    device: str | None = None
    node_name: str | None = None
    snapshot_file: str
    snapshot_node_name: str | None = None
    format: str = "qcow2"
    mode: Literal["absolute-paths"] = "absolute-paths"


async def blockdev_snapshot_sync(control: Control, arguments: SnapshotSync) -> None:
    """Make an image over the disk, and put it on top. The disk keeps its name, and the image gets the one given."""
    entry = control.nodes.get(arguments.node_name, arguments.device)
    name = arguments.snapshot_node_name
    if name is not None:
        control.nodes.check_name(name)
    if entry.node.read_only:
        raise QmpError(f"Block node is read-only: '{entry.name}'")
    if entry.moment is not None or control.nodes.moments_of(entry.node):
        raise QmpError(f"Node '{entry.name}' is in use by a 'copy-before-write' node")
    control.jobs.check_free(entry)
    path = await control.paths.check(arguments.snapshot_file, exists=False)
    overlay = await create_overlay(
        path, arguments.format, entry.node, backing_name=entry.node.path, roots=ImageRoots(control.paths.roots)
    )
    try:
        await snapshot([(entry.node, overlay)])
    except BaseException:
        await overlay.close()
        raise
    entry.driver = arguments.format
    if name is not None:
        control.nodes.name_part(entry, name, overlay)


COMMANDS: Final = (Command("blockdev-snapshot-sync", blockdev_snapshot_sync, SnapshotSync),)
