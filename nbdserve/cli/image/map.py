"""``nbdserve image map``."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Annotated, TypeAlias

import numpy as np
import numpy.typing as npt
import typer

from nbdserve.block.graph import open_image
from nbdserve.block.mapping import ChainMap, file_map, map_chain, split_by_holes
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    FileArgument,
    ForceShareOption,
    FormatOption,
    ImageOptsOption,
    ObjectsOption,
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    named_image,
    parsed_size,
    roots_for,
)
from nbdserve.cli.output import Output, OutputOption
from nbdserve.config.secrets import chosen_secret, secrets_of_objects
from nbdserve.errors import ImageError
from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED, ZERO
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.qcow2.preallocation import metadata_preallocated
from nbdserve.storage.base import Storage
from nbdserve.storage.joined import INSIDE_PART, PART_BITS, JoinedStorage

Columns: TypeAlias = npt.NDArray[np.int64]
"""Rows of ``start length depth flags offset``; offset -1 where there is none."""

PRESENT, ZEROES, HAS_DATA = 1, 2, 4
_ROWS_PRINTED = 1 << 16


def map_image(
    file: FileArgument,
    format_name: FormatOption = None,
    start_offset: Annotated[str, typer.Option("--start-offset", "-s", metavar="OFFSET", help="Where to begin.")] = "0",
    max_length: Annotated[
        str | None,
        typer.Option("--max-length", "-l", metavar="LENGTH", help="How much to look at.", show_default=False),
    ] = None,
    output: OutputOption = Output.HUMAN,
    force_share: ForceShareOption = False,
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    image_root: RootsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
) -> int:
    """Print where the data of an image is: in which file of its chain, and at which offset."""
    start = parsed_size(start_offset, "start offset")
    length = None if max_length is None else parsed_size(max_length, "max length")
    secret = chosen_secret(secret_file, secret_env)
    flags = ImageSpec(file, format_name, read_only=True, force_share=force_share, secret=secret)
    spec = named_image(file, flags, secrets_of_objects(objects or []), image_opts=image_opts)
    asyncio.run(_map(spec, start, length, output, image_root))
    return 0


async def _map(spec: ImageSpec, start: int, length: int | None, output: Output, image_root: list | None) -> None:  # type: ignore[type-arg]
    node = await open_image(spec, roots_for(spec.path, image_root))
    try:
        end = node.size if length is None else min(node.size, start + length)
        entries = merged(rows(node, start, end))
        if output is Output.JSON:
            await _print_json(entries, start, node)
        else:
            await _print_human(entries, node)
    finally:
        await node.close()


async def rows(node: Node, start: int, end: int) -> AsyncIterator[Columns]:
    """The map as qemu-img sees it: data that was only preallocated is looked up in its file's holes as well."""
    if start >= end:
        return
    holes = {
        depth: await file_map(layer.data)
        for depth, layer in enumerate(node.layers)
        if isinstance(layer, Qcow2Driver) and await metadata_preallocated(layer.storage, layer.header)
    }
    flat = [depth for depth, layer in enumerate(node.layers) if layer.name == "vmdk"]
    async for part in map_chain(node.layers, start, end):
        columns = part
        hole = np.zeros(len(part), np.bool_)
        for depth, runs in holes.items():
            before = columns
            columns, found = split_by_holes(columns, depth, runs)
            hole = hole[np.searchsorted(before.start, columns.start, "right") - 1] | found
        if flat:
            # A hole in the file of a flat extent is data that is not there, as QEMU has it.
            sparse = (columns.kind == ZERO) & (columns.host_offset >= 0) & np.isin(columns.depth, flat)
            hole, columns.kind = hole | sparse, np.where(sparse, DATA, columns.kind).astype(np.uint8)
        yield _rows(columns, hole)


def _rows(part: ChainMap, hole: npt.NDArray[np.bool_]) -> Columns:
    kind = part.kind
    flags = np.where(kind == UNALLOCATED, 0, PRESENT)
    flags |= np.where((kind == ZERO) | (kind == UNALLOCATED) | hole, ZEROES, 0)
    flags |= np.where((kind == DATA) | (kind == COMPRESSED), HAS_DATA, 0)
    offset = np.where(kind == COMPRESSED, -1, part.host_offset)
    return np.column_stack((part.start, part.length, part.depth.astype(np.int64), flags, offset))


async def merged(parts: AsyncIterator[Columns]) -> AsyncIterator[Columns]:
    """The same rows, merged where nothing but the position changes; the last of a piece waits for the next one."""
    pending: Columns | None = None
    async for part in parts:
        both = part if pending is None else np.concatenate((pending, part))
        start, length, depth, flags, offset = both.T
        same = (depth[1:] == depth[:-1]) & (flags[1:] == flags[:-1])
        follows = np.where(offset[:-1] < 0, offset[1:] < 0, offset[1:] == offset[:-1] + length[:-1])
        first = np.flatnonzero(np.concatenate(([True], ~(same & follows))))
        end = start[-1] + length[-1]
        both = both[first]
        both[:, 1] = np.diff(np.append(both[:, 0], end))
        pending = both[-1:]
        if len(both) > 1:
            yield both[:-1]
    if pending is not None:
        yield pending


def json_lines(part: Columns) -> list[str]:
    """One object per row, with qemu-img's keys and layout."""
    words = ("false", "true")
    tails = [
        f'"present": {words[flags & PRESENT]}, "zero": {words[flags >> 1 & 1]}, "data": {words[flags >> 2 & 1]}'
        for flags in range(8)
    ]
    return [
        f'{{ "start": {start}, "length": {length}, "depth": {depth}, {tails[flags]}'
        + (f', "offset": {offset}}}' if offset >= 0 else "}")
        for start, length, depth, flags, offset in part.tolist()
    ]


async def _print_json(entries: AsyncIterator[Columns], start: int, node: Node) -> None:
    opening = "["
    joined = [depth for depth, layer in enumerate(node.layers) if isinstance(layer.data, JoinedStorage)]
    async for part in entries:
        if joined:
            placed = (part[:, 4] >= 0) & np.isin(part[:, 2], joined)
            part[placed, 4] &= INSIDE_PART
        for first in range(0, len(part), _ROWS_PRINTED):
            sys.stdout.write(opening + ",\n".join(json_lines(part[first : first + _ROWS_PRINTED])))
            opening = ",\n"
    if opening == "[":
        sys.stdout.write(opening + json_lines(np.array([[start, 0, 0, 0, -1]]))[0])
    sys.stdout.write("]\n")


def _place(storage: Storage, offset: int) -> str:
    """The offset in a file, and the file, as columns."""
    if isinstance(storage, JoinedStorage):
        storage, offset = storage.parts[offset >> PART_BITS], offset & INSIDE_PART
    return f"{_hex(offset):<16}{storage.path}"


async def _print_human(entries: AsyncIterator[Columns], node: Node) -> None:
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    files = [layer.data for layer in node.layers]
    async for part in entries:
        shown = part[part[:, 3] & (HAS_DATA | ZEROES) == HAS_DATA]
        known = shown[:, 4] >= 0
        stop = len(shown) if known.all() else int(known.argmin())
        for first in range(0, stop, _ROWS_PRINTED):
            lines = [
                f"{_hex(start):<16}{_hex(length):<16}{_place(files[depth], offset)}\n"
                for start, length, depth, _, offset in shown[first : min(first + _ROWS_PRINTED, stop)].tolist()
            ]
            sys.stdout.write("".join(lines))
        if stop < len(shown):
            sys.stdout.flush()
            raise ImageError(
                node.path, "File contains external, encrypted or compressed clusters.", hint="--output json"
            )


def _hex(value: int) -> str:
    return f"{value:#x}" if value else "0"
