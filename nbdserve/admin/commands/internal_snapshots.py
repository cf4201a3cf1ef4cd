"""Internal snapshots: an image keeps the disk as it is now, and clients go on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Result
from nbdserve.admin.transaction import Action, execute
from nbdserve.block.node import Node
from nbdserve.formats.base import SnapshotInfo


class InternalSnapshot(Arguments):
    """Of ``blockdev-snapshot-internal-sync``."""

    device: str
    name: str


class DeleteSnapshot(Arguments):
    """Of ``blockdev-snapshot-delete-internal-sync``."""

    device: str
    id: str | None = None
    name: str | None = None


class SnapshotDescription(Result):
    """SnapshotInfo: the snapshot there was."""

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | None = None


class InternalSnapshotAction(Action):
    """``blockdev-snapshot-internal-sync``."""

    def __init__(self, control: Control, arguments: InternalSnapshot) -> None:
        self._control = control
        self._arguments = arguments
        self._made: SnapshotInfo | None = None

    @property
    def _entry(self) -> NodeEntry:
        return self._control.nodes.either(self._arguments.device)

    def nodes(self) -> Sequence[Node]:
        return [self._entry.node]

    async def prepare(self) -> None:
        device, name, entry = self._arguments.device, self._arguments.name, self._entry
        if entry.node.read_only:
            raise QmpError(f"Device '{device}' is read only")
        if not _keeps_snapshots(entry):
            raise QmpError(
                f"Block format '{entry.driver}' used by device '{device}' does not support internal snapshots"
            )
        if not name:
            raise QmpError("Name is empty")
        if any(name == each.name for each in entry.node.top.info().snapshots):
            raise QmpError(f"Snapshot with name '{name}' already exists on device '{device}'")
        self._control.jobs.check_free(entry)
        node = entry.node
        async with _renewed(node):
            self._made = await node.top.create_snapshot(name, icount=0)

    async def abort(self) -> None:
        assert self._made is not None
        await _delete(self._entry.node, self._made)


async def snapshot_internal(control: Control, arguments: InternalSnapshot) -> None:
    """Keep the disk as it is."""
    await execute([InternalSnapshotAction(control, arguments)])


async def delete_internal(control: Control, arguments: DeleteSnapshot) -> SnapshotDescription:
    """Forget a snapshot, and say what it was."""
    entry, wanted = control.nodes.either(arguments.device), (arguments.id, arguments.name)
    if wanted == (None, None):
        raise QmpError("Name or id must be provided")
    if not _keeps_snapshots(entry):
        raise QmpError("Failed to get a snapshot list: Operation not supported")
    node = entry.node
    async with node.drained():
        found = next(
            (
                each
                for each in node.top.info().snapshots
                if arguments.id in (None, each.id) and arguments.name in (None, each.name)
            ),
            None,
        )
        if found is None:
            identity, name = ("null" if part is None else part for part in wanted)
            raise QmpError(
                f"Snapshot with id '{identity}' and name '{name}' does not exist on device '{arguments.device}'"
            )
        if node.read_only:
            raise QmpError(f"Device '{arguments.device}' is read only")
        control.jobs.check_free(entry)
        await _delete(node, found)
    seconds, nanoseconds = divmod(found.vm_clock_nsec, 1_000_000_000)
    return SnapshotDescription(
        id=found.id,
        name=found.name,
        vm_state_size=found.vm_state_size,
        date_sec=found.date_sec,
        date_nsec=found.date_nsec,
        vm_clock_sec=seconds,
        vm_clock_nsec=nanoseconds,
        icount=found.icount or None,
    )


def _keeps_snapshots(entry: NodeEntry) -> bool:
    return not entry.is_filter and entry.node.top.can("create_snapshot")


async def _delete(node: Node, snapshot: SnapshotInfo) -> None:
    """Inside ``drained``."""
    async with _renewed(node):
        await node.top.delete_snapshot(snapshot.id)


@asynccontextmanager
async def _renewed(node: Node) -> AsyncIterator[None]:
    """Around a change of all tables: no place is remembered from before, not even if it fails, for it may be made."""
    await node.flush()
    try:
        yield
    finally:
        node.replace_layers(node.layers)


COMMANDS: Final = (
    Command("blockdev-snapshot-internal-sync", snapshot_internal, InternalSnapshot),
    Command("blockdev-snapshot-delete-internal-sync", delete_internal, DeleteSnapshot, SnapshotDescription),
)
