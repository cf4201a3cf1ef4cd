"""External snapshots: a new layer takes the writes, and what was there stays as it is."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final, Literal

from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.paths import full_path
from nbdserve.admin.schema import Arguments
from nbdserve.admin.transaction import Action, execute
from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import driver_for
from nbdserve.jobs.snapshot import as_overlay, create_overlay, snapshot, undo
from nbdserve.storage.file import FileStorage


class SnapshotSync(Arguments):
    """Of ``blockdev-snapshot-sync``."""

    device: str | None = None
    node_name: str | None = None
    snapshot_file: str
    snapshot_node_name: str | None = None
    format: str = "qcow2"
    mode: Literal["existing", "absolute-paths"] = "absolute-paths"


class SnapshotOverlay(Arguments):
    """Of ``blockdev-snapshot``."""

    node: str
    overlay: str


class _PutOnTop(Action):
    """Put an empty layer on a disk, which keeps its name; the layer has one of its own, if it is given one."""

    def __init__(self, control: Control) -> None:
        self._control = control

    @property
    @abstractmethod
    def entry(self) -> NodeEntry:
        """The disk. QmpError when it is not there."""

    def nodes(self) -> Sequence[Node]:
        return [self.entry.node]

    async def prepare(self) -> None:
        entry = self.entry
        if entry.node.read_only:
            raise QmpError(f"Block node is read-only: '{entry.name}'")
        if entry.moment is not None or self._control.nodes.moments_of(entry.node):
            raise QmpError(f"Node '{entry.name}' is in use by a 'copy-before-write' node")
        if entry.driver == "throttle":
            raise QmpError(f"Node '{entry.name}' is a filter: take the snapshot of the disk below it")
        self._control.jobs.check_free(entry)
        overlay = await self.open_overlay(entry)
        try:
            await snapshot([(entry.node, overlay)])
        except BaseException:
            await self.give_up(overlay)
            raise

    @abstractmethod
    async def open_overlay(self, entry: NodeEntry) -> FormatDriver:
        """The layer, open for writing."""

    @abstractmethod
    async def give_up(self, overlay: FormatDriver) -> None:
        """It is not used."""

    async def abort(self) -> None:
        await self.give_up(await undo(self.entry.node))


class SnapshotSyncAction(_PutOnTop):
    """``blockdev-snapshot-sync``: the layer is a new image, or, in mode ``existing``, one that was made before."""

    def __init__(self, control: Control, arguments: SnapshotSync) -> None:
        super().__init__(control)
        self._arguments = arguments
        self._made = ""

    @property
    def entry(self) -> NodeEntry:
        return self._control.nodes.get(self._arguments.node_name, self._arguments.device)

    async def open_overlay(self, entry: NodeEntry) -> FormatDriver:
        given, paths = self._arguments, self._control.paths
        roots = await asyncio.to_thread(paths.image_roots)
        if given.snapshot_node_name is not None:
            self._control.nodes.check_name(given.snapshot_node_name)
        if given.mode == "existing":
            file = await paths.open(given.snapshot_file, read_only=False)
            spec = ImageSpec(file.path, given.format, discard="unmap", backing=None, opened=file)
            image = await open_image(spec, roots)
            try:
                return await as_overlay(image, entry.node.top)
            except BaseException:
                await image.close()
                raise
        path = full_path(given.snapshot_file)

        async def make() -> FileStorage:
            file, is_new = await paths.create(path)
            self._made = path if is_new else ""
            return file

        try:
            return await create_overlay(
                path, given.format, entry.node, backing_name=entry.node.path, roots=roots, make=make
            )
        except BaseException:
            await self._remove()
            raise

    async def give_up(self, overlay: FormatDriver) -> None:
        await overlay.close()
        await self._remove()

    async def _remove(self) -> None:
        if self._made:
            await self._control.paths.remove(self._made)

    def commit(self) -> None:
        entry, name = self.entry, self._arguments.snapshot_node_name
        entry.driver = self._arguments.format
        if name is not None:
            self._control.nodes.name_part(entry, name, entry.node.top)


class SnapshotAction(_PutOnTop):
    """``blockdev-snapshot``: the layer is a node that was opened for that, without a backing file."""

    def __init__(self, control: Control, arguments: SnapshotOverlay) -> None:
        super().__init__(control)
        self._arguments = arguments
        self._overlay: NodeEntry | None = None

    @property
    def entry(self) -> NodeEntry:
        return self._control.nodes.either(self._arguments.node)

    async def open_overlay(self, entry: NodeEntry) -> FormatDriver:
        overlay = self._control.nodes.either(self._arguments.overlay)
        if overlay is entry or len(overlay.layers) > 1:
            raise QmpError("The overlay already has a backing image")
        if overlay.users:
            raise QmpError("The overlay is already in use")
        options = driver_for(overlay.node.format).create_options
        if overlay.driver == "throttle" or all(option.name != "backing_file" for option in options):
            raise QmpError("The overlay does not support backing images")
        if overlay.node.read_only:
            raise QmpError(f"Block node is read-only: '{overlay.name}'")
        overlay.users.append("transaction")
        self._overlay = overlay
        try:
            return await as_overlay(overlay.node, entry.node.top)
        except BaseException:
            overlay.users.remove("transaction")
            raise

    async def give_up(self, overlay: FormatDriver) -> None:
        assert self._overlay is not None
        self._overlay.users.remove("transaction")

    def commit(self) -> None:
        assert self._overlay is not None
        self.entry.driver = self._overlay.driver
        self._control.nodes.absorb(self.entry, self._overlay)


async def blockdev_snapshot_sync(control: Control, arguments: SnapshotSync) -> None:
    """Make an image over the disk, and put it on top. The disk keeps its name, and the image gets the one given."""
    await execute([SnapshotSyncAction(control, arguments)])


async def blockdev_snapshot(control: Control, arguments: SnapshotOverlay) -> None:
    """Put an image on top of the disk, which keeps its name; that of the image means the same from then on."""
    await execute([SnapshotAction(control, arguments)])


COMMANDS: Final = (
    Command("blockdev-snapshot-sync", blockdev_snapshot_sync, SnapshotSync),
    Command("blockdev-snapshot", blockdev_snapshot, SnapshotOverlay),
)
