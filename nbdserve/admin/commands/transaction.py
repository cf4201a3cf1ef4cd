"""``transaction``: several actions, all or none, at one moment."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import Tag

from nbdserve.admin.blockdev import BitmapName
from nbdserve.admin.command import Command
from nbdserve.admin.commands import bitmaps
from nbdserve.admin.commands.backup import BackupAction, BackupOptions, DriveBackup, DriveBackupAction
from nbdserve.admin.commands.exports import ExportAddAction, ExportDelAction, ExportOptions, ExportRemove
from nbdserve.admin.commands.internal_snapshots import InternalSnapshot, InternalSnapshotAction
from nbdserve.admin.commands.snapshots import SnapshotAction, SnapshotOverlay, SnapshotSync, SnapshotSyncAction
from nbdserve.admin.control import Control
from nbdserve.admin.schema import Arguments, Nothing, union
from nbdserve.admin.transaction import Abort, Action, execute
from nbdserve.jobs.transaction import Transaction


class AbortAction(Arguments):
    """Fails."""

    type: Literal["abort"]
    data: Nothing


class AddAction(Arguments):
    """``block-dirty-bitmap-add``."""

    type: Literal["block-dirty-bitmap-add"]
    data: bitmaps.BitmapAdd


class BitmapAction(Arguments):
    """An action on one bitmap."""

    type: Literal[
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-remove",
    ]
    data: BitmapName


class MergeAction(Arguments):
    """``block-dirty-bitmap-merge``."""

    type: Literal["block-dirty-bitmap-merge"]
    data: bitmaps.BitmapMerge


class StartBackup(Arguments):
    """``blockdev-backup``."""

    type: Literal["blockdev-backup"]
    data: BackupOptions


class StartDriveBackup(Arguments):
    """``drive-backup``."""

    type: Literal["drive-backup"]
    data: DriveBackup


class AddExport(Arguments):
    """``block-export-add``."""

    type: Literal["__org.nbdserve_block-export-add"]
    data: ExportOptions


class RemoveExport(Arguments):
    """``block-export-del``."""

    type: Literal["__org.nbdserve_block-export-del"]
    data: ExportRemove


class TakeSnapshot(Arguments):
    """``blockdev-snapshot``."""

    type: Literal["blockdev-snapshot"]
    data: SnapshotOverlay


class TakeSnapshotSync(Arguments):
    """``blockdev-snapshot-sync``."""

    type: Literal["blockdev-snapshot-sync"]
    data: SnapshotSync


class TakeInternalSnapshot(Arguments):
    """``blockdev-snapshot-internal-sync``."""

    type: Literal["blockdev-snapshot-internal-sync"]
    data: InternalSnapshot


TransactionAction: TypeAlias = Annotated[
    Annotated[AbortAction, Tag("=abort")]
    | Annotated[AddAction, Tag("=block-dirty-bitmap-add")]
    | Annotated[BitmapAction, Tag("=block-dirty-bitmap-clear")]
    | Annotated[BitmapAction, Tag("=block-dirty-bitmap-disable")]
    | Annotated[BitmapAction, Tag("=block-dirty-bitmap-enable")]
    | Annotated[BitmapAction, Tag("=block-dirty-bitmap-remove")]
    | Annotated[MergeAction, Tag("=block-dirty-bitmap-merge")]
    | Annotated[StartBackup, Tag("=blockdev-backup")]
    | Annotated[StartDriveBackup, Tag("=drive-backup")]
    | Annotated[TakeSnapshot, Tag("=blockdev-snapshot")]
    | Annotated[TakeInternalSnapshot, Tag("=blockdev-snapshot-internal-sync")]
    | Annotated[TakeSnapshotSync, Tag("=blockdev-snapshot-sync")]
    | Annotated[AddExport, Tag("=__org.nbdserve_block-export-add")]
    | Annotated[RemoveExport, Tag("=__org.nbdserve_block-export-del")],
    union("type"),
]


class Properties(Arguments):
    """TransactionProperties: whether jobs end each by itself, or all or none of them well."""

    completion_mode: Literal["individual", "grouped"] = "individual"


class TransactionOptions(Arguments):
    """Of ``transaction``."""

    actions: list[TransactionAction]
    properties: Properties | None = None


_ACTIONS: Final[dict[str, Any]] = {
    "__org.nbdserve_block-export-add": ExportAddAction,
    "__org.nbdserve_block-export-del": ExportDelAction,
    "block-dirty-bitmap-add": bitmaps.Add,
    "block-dirty-bitmap-clear": bitmaps.Clear,
    "block-dirty-bitmap-disable": bitmaps.Disable,
    "block-dirty-bitmap-enable": bitmaps.Enable,
    "block-dirty-bitmap-merge": bitmaps.Merge,
    "block-dirty-bitmap-remove": bitmaps.Remove,
    "blockdev-snapshot": SnapshotAction,
    "blockdev-snapshot-internal-sync": InternalSnapshotAction,
    "blockdev-snapshot-sync": SnapshotSyncAction,
}


async def transaction(control: Control, arguments: TransactionOptions) -> None:
    """All of the actions, or none; the requests of their disks are held back meanwhile."""
    is_grouped = arguments.properties is not None and arguments.properties.completion_mode == "grouped"
    group = Transaction() if is_grouped else None
    await execute([_action(control, given, group) for given in arguments.actions])


def _action(control: Control, given: TransactionAction, group: Transaction | None) -> Action:
    if isinstance(given, AbortAction):
        return Abort()
    if isinstance(given, StartBackup):
        return BackupAction(control, given.data, group)
    if isinstance(given, StartDriveBackup):
        return DriveBackupAction(control, given.data, group)
    action: Action = _ACTIONS[given.type](control, given.data)
    return action


COMMANDS: Final = (Command("transaction", transaction, TransactionOptions),)
