"""``query-blockstats``: what has been read from and written to disks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from pydantic import ConfigDict, Field

from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Result
from nbdserve.block import counting
from nbdserve.storage.file import FileStorage


class StatsOptions(Arguments):
    """Of ``query-blockstats``."""

    query_nodes: bool = False


class BlockDeviceStats(Result):
    """Counters. Those that are always 0 here count what does not happen: requests are not merged, and invalid ones do
    not get as far as the disk."""

    model_config = ConfigDict(alias_generator=None)

    rd_bytes: int = 0
    wr_bytes: int = 0
    unmap_bytes: int = 0
    rd_operations: int = 0
    wr_operations: int = 0
    flush_operations: int = 0
    unmap_operations: int = 0
    rd_total_time_ns: int = 0
    wr_total_time_ns: int = 0
    flush_total_time_ns: int = 0
    unmap_total_time_ns: int = 0
    wr_highest_offset: int = 0
    rd_merged: int = 0
    wr_merged: int = 0
    unmap_merged: int = 0
    failed_rd_operations: int = 0
    failed_wr_operations: int = 0
    failed_flush_operations: int = 0
    failed_unmap_operations: int = 0
    invalid_rd_operations: int = 0
    invalid_wr_operations: int = 0
    invalid_flush_operations: int = 0
    invalid_unmap_operations: int = 0
    account_invalid: bool = False
    account_failed: bool = True
    timed_stats: list[dict[str, Any]] = Field(default=[])


class BlockStats(Result):
    """Of a node. Its file, ``parent``, has its size as ``wr_highest_offset``; requests are counted for the node."""

    device: str | None = None
    qdev: str | None = None
    node_name: str
    stats: BlockDeviceStats
    parent: BlockStats | None = None


async def query_blockstats(control: Control, arguments: StatsOptions) -> list[BlockStats]:
    """Of the disks that ``query-block`` shows, or of all nodes. They are counted from the first time this is asked."""
    entries = list(control.nodes) if arguments.query_nodes else control.devices()
    return [stats for entry in entries for stats in _stats(control, entry, device=not arguments.query_nodes)]


def _stats(control: Control, entry: NodeEntry, *, device: bool) -> Iterator[BlockStats]:
    counters = counting.begin(entry.node)
    read, write, flush, discard = counters.read, counters.write, counters.flush, counters.discard
    stats = BlockDeviceStats(
        rd_bytes=read.bytes,
        wr_bytes=write.bytes,
        unmap_bytes=discard.bytes,
        rd_operations=read.operations,
        wr_operations=write.operations,
        flush_operations=flush.operations,
        unmap_operations=discard.operations,
        rd_total_time_ns=read.time_ns,
        wr_total_time_ns=write.time_ns,
        flush_total_time_ns=flush.time_ns,
        unmap_total_time_ns=discard.time_ns,
        wr_highest_offset=counters.highest_end,
        failed_rd_operations=read.failed,
        failed_wr_operations=write.failed,
        failed_flush_operations=flush.failed,
        failed_unmap_operations=discard.failed,
    )
    files = [
        BlockStats(node_name=name, stats=BlockDeviceStats(wr_highest_offset=part.size))
        for name, part in control.nodes.parts(entry)
        if isinstance(part, FileStorage)
    ]
    mark: dict[str, Any] = {"device": "", "qdev": entry.name} if device else {}
    yield BlockStats(node_name=entry.name, stats=stats, parent=files[0] if files else None, **mark)
    if not device:
        yield from files


COMMANDS: Final = (Command("query-blockstats", query_blockstats, StatsOptions, list[BlockStats]),)
