"""Images that commands read: as they are named on the command line, and opened together."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

from nbdserve.block.graph import image_roots, open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import named_image
from nbdserve.config.image_opts import snapshot_name
from nbdserve.errors import ConfigError, naming
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.file import FileStorage

_READ_BYTES: Final = 1 << 20

STREAM: Final = "-"
"""The name of standard input and output."""


def source_spec(
    text: str,
    flags: ImageSpec,
    *,
    image_opts: bool = False,
    secrets: Mapping[str, bytes],
    snapshot: str | None = None,
) -> ImageSpec:
    """The image to read that the command line calls ``text``."""
    spec = named_image(text, replace(flags, read_only=True), secrets, image_opts=image_opts)
    return replace(spec, snapshot=snapshot_name(snapshot)) if snapshot is not None else spec


@asynccontextmanager
async def opened(specs: Sequence[ImageSpec], roots: Sequence[Path] = ()) -> AsyncIterator[list[Node]]:
    """The disks of all of them, closed at the end. ``-`` is what standard input holds."""
    async with AsyncExitStack() as files:
        nodes: list[Node] = []
        for spec in specs:
            node = await _open(spec, roots)
            files.push_async_callback(node.close)
            nodes.append(node)
        yield nodes


async def _open(spec: ImageSpec, roots: Sequence[Path]) -> Node:
    if spec.path != STREAM:
        return await open_image(spec, image_roots(spec.path, roots))
    if spec.format not in (None, "raw"):
        raise ConfigError(f"standard input is read from its beginning to its end, which {spec.format} images are not")
    with tempfile.TemporaryFile() as file:
        with naming(tempfile.gettempdir()):
            while data := await _read_input(sys.stdin.fileno()):
                file.write(data)
            file.flush()
        fd = os.dup(file.fileno())
    storage = await FileStorage.from_fd(fd, "standard input", locking=False)
    return Node([await RawDriver.open(storage, {}, read_only=True)])


async def _read_input(fd: int) -> bytes:
    """What is there of it, empty at its end. Ctrl-C is heeded while nothing is."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(fd, ready.set)
    except PermissionError:  # a regular file, which is always readable
        return os.read(fd, _READ_BYTES)
    try:
        await ready.wait()
        return os.read(fd, _READ_BYTES)
    finally:
        loop.remove_reader(fd)
