"""Nodes: opening, closing, looking at them, changing their size."""

from __future__ import annotations

from typing import Final

from nbdserve.admin.blockdev import BlockdevOptions
from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.describe import BlockDeviceInfo, BlockInfo, device_info, dirty_info, part_infos
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Int, Nothing
from nbdserve.units import SECTOR_SIZE


class NodeName(Arguments):
    """Of ``blockdev-del``."""

    node_name: str


class Flat(Arguments):
    """Of ``query-named-block-nodes``."""

    flat: bool = False


class Resize(Arguments):
    """Of ``block_resize``."""

    device: str | None = None
    node_name: str | None = None
    size: Int


async def blockdev_add(control: Control, options: BlockdevOptions) -> None:
    """Open a node."""
    await control.opener.open(options)


async def blockdev_del(control: Control, arguments: NodeName) -> None:
    """Close a node."""
    await control.nodes.remove(arguments.node_name).close()


async def query_block(control: Control, arguments: Nothing) -> list[BlockInfo]:
    """The disks, each as a device whose ``qdev`` is the name of its node."""
    return [BlockInfo(qdev=entry.name, inserted=described(control, entry)) for entry in control.devices()]


async def query_named_block_nodes(control: Control, arguments: Flat) -> list[BlockDeviceInfo]:
    """The nodes, the newest first, with the layers and files they are made of."""
    infos: list[BlockDeviceInfo] = []
    for entry in reversed(list(control.nodes)):
        infos.append(described(control, entry, flat=arguments.flat))
        infos += part_infos(control.nodes, entry, flat=arguments.flat)
    return infos


def described(control: Control, entry: NodeEntry, *, flat: bool = False) -> BlockDeviceInfo:
    """One node."""
    return device_info(entry, map(dirty_info, entry.node.bitmaps), flat=flat)


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
    Command("block_resize", block_resize, Resize),
)
