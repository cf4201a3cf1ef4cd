"""Nodes: opening, closing, looking at them, changing their size."""

from __future__ import annotations

from typing import Final

from nbdserve.admin.backing import take_in
from nbdserve.admin.blockdev import BlockdevOptions
from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.describe import BlockDeviceInfo, BlockInfo, device_info, dirty_info, part_infos
from nbdserve.admin.errors import DEVICE_NOT_FOUND, QmpError, description_of
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Int, Nothing, Size
from nbdserve.errors import RequestError
from nbdserve.formats.base import BackingReference
from nbdserve.jobs.commit import put_on
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE


class NodeName(Arguments):
    """Of ``blockdev-del``."""

    node_name: str


class Flat(Arguments):
    """Of ``query-named-block-nodes``."""

    flat: bool = False


class ThresholdOptions(Arguments):
    """Of ``block-set-write-threshold``, in bytes; 0: none."""

    node_name: str
    write_threshold: Size


class BackingFile(Arguments):
    """Of ``change-backing-file``."""

    device: str
    image_node_name: str
    backing_file: str


class Resize(Arguments):
    """Of ``block_resize``."""

    device: str | None = None
    node_name: str | None = None
    size: Int


async def blockdev_add(control: Control, options: BlockdevOptions) -> None:
    """Open a node."""
    await control.opener.open(options)


async def blockdev_del(control: Control, arguments: NodeName) -> None:
    """Close a node, which is then gone in any case."""
    entry = control.nodes.remove(arguments.node_name)
    written = (entry.inner or entry.node).changes > 1  # as many as there are at the beginning
    try:
        await entry.close()
    except (OSError, RequestError) as error:
        if written:
            reason = f"Node '{entry.name}' is deleted, and what was written to it last may be lost"
            raise QmpError(f"{reason}: {description_of(error)}") from error


async def query_block(control: Control, arguments: Nothing) -> list[BlockInfo]:
    """The disks, each as a device whose ``qdev`` is the name of its node."""
    return [BlockInfo(qdev=entry.name, inserted=described(control, entry)) for entry in control.devices()]


async def query_named_block_nodes(control: Control, arguments: Flat) -> list[BlockDeviceInfo]:
    """The nodes, the newest first, with the layers and files they are made of."""
    infos: list[BlockDeviceInfo] = []
    for entry in reversed(list(control.nodes)):
        infos.append(described(control, entry, flat=arguments.flat))
        parts = dict(control.nodes.parts(entry))
        for info in part_infos(control.nodes, entry, flat=arguments.flat):
            info.write_threshold = control.thresholds.get(parts[info.node_name])
            infos.append(info)
    return infos


def described(control: Control, entry: NodeEntry, *, flat: bool = False) -> BlockDeviceInfo:
    """One node."""
    info = device_info(entry, map(dirty_info, entry.node.bitmaps), flat=flat)
    info.write_threshold = control.thresholds.get(entry.node)
    return info


async def set_write_threshold(control: Control, arguments: ThresholdOptions) -> None:
    """Tell once when a disk is written past an offset, or its file has grown past a size."""
    name = arguments.node_name
    for entry in control.nodes:
        part = dict(control.nodes.parts(entry)).get(name)
        if entry.name == name or part is entry.node.top:
            control.thresholds.set(name, entry.node, None, arguments.write_threshold)
            return
        if isinstance(part, Storage):
            control.thresholds.set(name, entry.node, part, arguments.write_threshold)
            return
    raise QmpError(f"Device '{name}' not found", DEVICE_NOT_FOUND)


async def change_backing_file(control: Control, arguments: BackingFile) -> None:
    """Write another name of the layer below into the header of a layer; the chain stays as it is."""
    entry = control.nodes.either(arguments.device)
    try:
        index = entry.index_of(*control.nodes.layer(arguments.image_node_name))
    except QmpError:
        if control.nodes.find(arguments.image_node_name) is None:
            raise QmpError(f"Cannot find device='' nor node-name='{arguments.image_node_name}'") from None
        index = len(entry.layers) - 1  # a file, which has no backing file
    if index is None:
        raise QmpError(f"'{arguments.device}' and image file are not in the same chain")
    if index + 1 >= len(entry.layers):
        raise QmpError("not allowing backing file change on an image without a backing file")
    layer, below = entry.layers[index : index + 2]
    if not layer.can("set_backing"):
        raise QmpError(f"Could not change backing file to '{arguments.backing_file}': Operation not supported")
    if layer.read_only and index == 0:
        raise QmpError(f"Block node is read-only: '{entry.name}'")
    control.jobs.check_free(entry)
    await take_in(control.nodes, entry, index)
    async with entry.node.drained():
        if entry.layers[index : index + 2] != [layer, below]:
            raise QmpError(f"Node '{entry.name}' has got other layers meanwhile: try again")
        await put_on(entry.node, index, index + 1, BackingReference(arguments.backing_file, below.name))


async def block_resize(control: Control, arguments: Resize) -> None:
    """Give a disk another size, which clients see when they connect again."""
    entry = control.nodes.get(arguments.node_name, arguments.device)
    if arguments.size < 0:
        raise QmpError("Parameter 'size' expects a >0 size")
    node = entry.node
    if entry.driver == "null-co" or not node.top.can("resize"):
        raise QmpError("Image format driver does not support resize")
    if node.read_only:
        raise QmpError("Image is read-only")
    if arguments.size % SECTOR_SIZE and entry.driver not in ("raw", "file"):
        raise QmpError(f"The new size must be a multiple of {SECTOR_SIZE}")
    await node.resize(arguments.size)


COMMANDS: Final = (
    Command("blockdev-add", blockdev_add, BlockdevOptions),
    Command("blockdev-del", blockdev_del, NodeName),
    Command("query-block", query_block, returns=list[BlockInfo]),
    Command("query-named-block-nodes", query_named_block_nodes, Flat, list[BlockDeviceInfo]),
    Command("block-set-write-threshold", set_write_threshold, ThresholdOptions),
    Command("change-backing-file", change_backing_file, BackingFile),
    Command("block_resize", block_resize, Resize),
)
