"""``nbdserve image bench``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from nbdserve.block.forms import READ_DATA, READ_ZERO
from nbdserve.block.graph import image_roots, open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    FileArgument,
    ForceShareOption,
    FormatOption,
    ImageOptsOption,
    ObjectsOption,
    QuietOption,
    RootsOption,
    check_cache,
    named_image,
    parsed_size,
)
from nbdserve.cli.usage import UsageError
from nbdserve.config.secrets import secrets_of_objects
from nbdserve.errors import ConfigError, naming

_MOST: Final = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class _Bench:
    count: int
    depth: int
    size: int
    step: int
    offset: int
    write: bool
    pattern: int
    flush_interval: int
    drain: bool


def bench(
    file: FileArgument,
    format_name: FormatOption = None,
    count: Annotated[int, typer.Option("-c", metavar="COUNT", help="Requests.", min=1, max=_MOST)] = 75000,
    depth: Annotated[int, typer.Option("-d", metavar="DEPTH", help="Requests in flight.", min=1, max=_MOST)] = 64,
    size: Annotated[str, typer.Option("-s", metavar="SIZE", help="Bytes of each request.")] = "4k",
    step: Annotated[
        str, typer.Option("-S", metavar="SIZE", help="From one request to the next; 0: the size of a request.")
    ] = "0",
    offset: Annotated[str, typer.Option("-o", metavar="OFFSET", help="Where to begin.")] = "0",
    write: Annotated[bool, typer.Option("-w", help="Write. What the image holds is lost.")] = False,
    pattern: Annotated[int, typer.Option("--pattern", metavar="BYTE", help="What to write.", min=0, max=255)] = 0,
    flush_interval: Annotated[
        int, typer.Option("--flush-interval", metavar="N", help="Flush after every N writes; 0: never.", min=0)
    ] = 0,
    no_drain: Annotated[
        bool, typer.Option("--no-drain", help="Flush without waiting for the requests in flight.")
    ] = False,
    cache: Annotated[str, typer.Option("-t", metavar="CACHE", help="Cache mode.")] = "writeback",
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    force_share: ForceShareOption = False,
    image_root: RootsOption = None,
    quiet: QuietOption = False,
) -> int:
    """Measure how long a sequence of reads, or writes, of an image takes."""
    if not write and flush_interval:
        raise UsageError("--flush-interval is only available in write tests")
    if flush_interval and flush_interval < depth:
        raise UsageError("Flush interval can't be smaller than depth")
    length = parsed_size(size, "buffer size", 1, _MOST)
    asked = _Bench(
        count=count,
        depth=depth,
        size=length,
        step=parsed_size(step, "step size", 0, _MOST) or length,
        offset=parsed_size(offset, "offset"),
        write=write,
        pattern=pattern,
        flush_interval=flush_interval,
        drain=not no_drain,
    )
    flags = ImageSpec(
        "", format_name, read_only=not write, cache=check_cache(cache, "image cache option"), force_share=force_share
    )
    spec = named_image(file, flags, secrets_of_objects(objects or []), image_opts=image_opts)
    asyncio.run(_bench(spec, image_root or (), asked, quiet=quiet))
    return 0


async def _bench(spec: ImageSpec, roots: Sequence[Path], asked: _Bench, *, quiet: bool) -> None:
    node = await open_image(spec, image_roots(spec.path, roots))
    try:
        if node.size < asked.size:
            raise ConfigError(f"{node.path}: a request of {asked.size} bytes is longer than the disk ({node.size})")
        if not quiet:
            kind = "write" if asked.write else "read"
            print(
                f"Sending {asked.count} {kind} requests, {asked.size} bytes each, {asked.depth} in parallel "
                f"(starting at offset {asked.offset}, step size {asked.step})"
            )
            if asked.flush_interval:
                print(f"Sending flush every {asked.flush_interval} requests")
        began = time.perf_counter()
        with naming(node.path):
            await _Run(node, asked).run()
        if not quiet:
            print(f"Run completed in {time.perf_counter() - began:3.3f} seconds.")
    finally:
        await node.close()


class _Run:
    """The requests, as many at a time as was asked for."""

    def __init__(self, node: Node, asked: _Bench) -> None:
        self._node = node
        self._asked = asked
        self._begun = 0
        self._ended = 0
        self._offset = asked.offset

    async def run(self) -> None:
        """All of them."""
        asked = self._asked
        while self._begun < asked.count:
            until = asked.count
            if asked.flush_interval and asked.drain:
                until = min(until, self._begun + asked.flush_interval)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(asked.depth, until - self._begun)):
                        group.create_task(self._worker(until))
            except ExceptionGroup as failures:
                raise failures.exceptions[0] from None
            if asked.flush_interval and asked.drain and until < asked.count:
                await self._node.flush()

    async def _worker(self, until: int) -> None:
        asked, node = self._asked, self._node
        buffer = bytearray([asked.pattern]) * asked.size
        with memoryview(buffer) as data:
            while self._begun < until:
                self._begun += 1
                offset = self._offset % node.size
                self._offset = (offset + asked.step) % node.size
                length = min(asked.size, node.size - offset)
                if asked.write:
                    await node.write(offset, data[:length])
                elif node.try_read_into(offset, data[:length]) not in (READ_DATA, READ_ZERO):
                    await node.read_pieces(offset, data[:length])
                self._ended += 1
                if asked.flush_interval and not asked.drain and self._ended % asked.flush_interval == 0:
                    await node.flush()
