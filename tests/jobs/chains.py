"""Chains of small images in files, for the tests of live jobs."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.formats.registry import driver_for
from nbdserve.jobs.job import Job
from nbdserve.jobs.status import JobStatus
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB

SIZE = 1024 * KIB
UNIT = 64 * KIB


async def make(path: Path, fmt: str = "qcow2", size: int = SIZE, *, backing: Path | None = None) -> Path:
    """An empty image, over ``backing``, whose suffix is its format."""
    options = {} if backing is None else {"backing_file": backing.name, "backing_fmt": backing.suffix[1:]}
    if fmt == "vpc" and backing is None:
        options["force_size"] = "on"
    storage = await FileStorage.open(str(path), create=True)
    async with AsyncExitStack() as opened:
        below = None
        if backing is not None and driver_for(fmt).needs_open_backing:
            node = await open_image(ImageSpec(str(backing), fmt, read_only=True))
            opened.push_async_callback(node.close)
            below = node.top
        await driver_for(fmt).create(storage, size, options, backing=below)
    await storage.close()
    return path


async def chain(folder: Path, *layers: str, sizes: tuple[int, ...] = ()) -> Node:
    """``layers`` from the bottom up, open for writing: a format, and what is written: ``qcow2 0a 3b`` has letters at
    units 0 and 3."""
    below: Path | None = None
    spec: ImageSpec | None = None  # says every format, for the headers of QED have no word for most
    for number, text in enumerate(layers):
        fmt, *writes = text.split()
        size = sizes[number] if sizes else SIZE
        path = await make(folder / f"{number}.{fmt}", fmt, size, backing=below)
        spec = ImageSpec(str(path), fmt, backing="header" if spec is None else replace(spec, path=""))
        node = await open_image(spec)
        for write in writes:
            at, letter = int(write[:-1]), write[-1]
            if letter == "z":
                await node.zero(at * UNIT, UNIT)
            else:
                await node.write(at * UNIT, letter.encode() * UNIT)
        await node.close()
        below = path
    assert spec is not None
    return await open_image(spec)


async def letters(node: Node) -> str:
    """One character for each unit: the byte it is full of, ``.`` for zeroes."""
    shown = []
    content = await node.read(0, node.size)
    for offset in range(0, node.size, UNIT):
        unit = content[offset : offset + UNIT]
        assert unit == unit[:1] * len(unit), f"different bytes in the unit at {offset}"
        shown.append(chr(unit[0]) if unit[0] else ".")
    return "".join(shown).rstrip(".")


async def opened(path: Path) -> str:
    """``letters`` of an image in a file, opened for the purpose."""
    node = await open_image(ImageSpec(str(path), path.suffix[1:], read_only=True))
    try:
        return await letters(node)
    finally:
        await node.close()


def begin(job: Job) -> Job:
    """Start ``job``, which is in no set."""
    job.announce(lambda event: None)
    job.start()
    return job


async def until(job: Job, status: JobStatus) -> None:
    """Wait until the job is there."""
    async with asyncio.timeout(60):
        while job.status is not status:
            assert job.error is None, job.error
            await asyncio.sleep(0.002)
