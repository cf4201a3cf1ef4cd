"""``nbdserve image raw-cow``: from and to qcow2 with an external data file."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer

from nbdserve.cli.image.common import RootsOption, full_name, open_layer, roots_for
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.formats.raw_cow.driver import RawCowDriver
from nbdserve.formats.raw_cow.exchange import export_to_qcow2, import_from_qcow2
from nbdserve.jobs.beside import Beside
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage

app = typer.Typer(
    name="raw-cow",
    help="Carry a raw-cow image to and from qcow2 with a data file, which stock tools read. Only metadata is written; "
    "afterwards use one of the two images, since neither learns what is written through the other.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("export")
def export_image(
    file: Annotated[str, typer.Argument(metavar="RAW-COW", help="The raw-cow image.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="QCOW2", help="The image to make.", show_default=False)],
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> int:
    """Make a qcow2 image with the raw file as its data file, and the same backing file.

    QEMU's tools look for a data file with a relative name in their current directory: run them where the image is.
    """
    _refuse_existing(target)
    asyncio.run(_export(file, target, quiet=quiet))
    return 0


@app.command("import")
def import_image(
    file: Annotated[
        str, typer.Argument(metavar="QCOW2", help="A qcow2 image with an external data file.", show_default=False)
    ],
    target: Annotated[str, typer.Argument(metavar="RAW-COW", help="The image to make.", show_default=False)],
    image_root: RootsOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> int:
    """Make a raw-cow image over the data file of a qcow2 image, and the same backing file."""
    _refuse_existing(target)
    asyncio.run(_import(file, target, image_root, quiet=quiet))
    return 0


def _refuse_existing(target: str) -> None:
    if os.path.lexists(target):
        raise ConfigError(f"{target}: it exists already")


async def _export(file: str, target: str, *, quiet: bool) -> None:
    source = await open_layer(file, RawCowDriver.name)
    try:
        assert isinstance(source, RawCowDriver)
        raw_file = renamed(source.header.raw_file, file, target)
        backing = None if source.backing is None else renamed(source.backing.name, file, target)
        await _make(target, lambda made: export_to_qcow2(source, made, raw_file=raw_file, backing_file=backing))
    finally:
        await source.close()
    if not quiet:
        print(f"'{target}' is a qcow2 image of the same disk; its data file is '{raw_file}'")


async def _import(file: str, target: str, image_root: list[Path] | None, *, quiet: bool) -> None:
    zeroed = 0
    async with _open_qcow2(file, image_root) as (source, raw):
        raw_file = renamed(source.header.data_file_name or "", file, target)
        backing = None if source.backing is None else renamed(source.backing.name, file, target)

        async def make(made: Storage) -> None:
            nonlocal zeroed
            zeroed = await import_from_qcow2(
                source,
                raw,
                made,
                raw_file=raw_file,
                backing_file=backing,
                backing_changed_at=_changed_at(source, file, image_root),
            )

        await _make(target, make)
    if not quiet:
        print(f"'{target}' is a raw-cow image of the same disk; its raw file is '{raw_file}'")
        if zeroed:
            print(f"{zeroed} bytes of the raw file became zeroes, as the qcow2 image says they are")


def _changed_at(source: Qcow2Driver, file: str, image_root: list[Path] | None) -> float:
    """When the backing file was last changed; 0 where there is none, or it cannot be opened."""
    if source.backing is None:
        return 0
    try:
        fd = roots_for(file, image_root).open_beneath(source.backing.name, relative_to=file, flags=os.O_RDONLY)
    except ImageError:
        return 0
    try:
        return os.fstat(fd).st_mtime
    finally:
        os.close(fd)


@asynccontextmanager
async def _open_qcow2(file: str, image_root: list[Path] | None) -> AsyncIterator[tuple[Qcow2Driver, Storage]]:
    """The image, read-only, and its data file, writable: nobody else is using either of them."""
    storage = await FileStorage.open(file, read_only=True)
    raw: FileStorage | None = None
    try:
        companions = await Qcow2Driver.companions(storage)
        if not companions:
            raise ImageError(file, "the guest's data are in the image itself, a raw-cow image needs a data file")
        [companion] = companions
        flags = os.O_RDWR | os.O_CLOEXEC
        fd = roots_for(file, image_root).open_beneath(
            companion.name, relative_to=file, flags=flags, field=companion.field
        )
        if (os.fstat(fd).st_dev, os.fstat(fd).st_ino) == storage.identity:
            os.close(fd)
            raise ImageError(file, "it is the image itself", field=companion.field, value=companion.name)
        raw = await FileStorage.from_fd(fd, full_name(file, companion.name))
        yield await Qcow2Driver.open(storage, {"companions": [raw]}, read_only=True), raw
    finally:
        if raw is not None:
            await raw.close()
        await storage.close()


async def _make(target: str, write: Callable[[Storage], Awaitable[None]]) -> None:
    """Have ``write`` fill a new file, which gets the name ``target`` when it is complete and stable."""
    beside = Beside(target)
    await beside.open()
    try:
        storage = await FileStorage.open(beside.path, create=True)
        try:
            await write(storage)
            await storage.flush()
        finally:
            await storage.close()
        await beside.publish(sync=True)
    finally:
        await beside.close()


def renamed(name: str, named_by: str, target: str) -> str:
    """What the header of ``target`` has to call the file that the header of ``named_by`` calls ``name``."""
    here, there = os.path.realpath(Path(named_by).parent), os.path.realpath(Path(target).parent)
    if name.startswith("/") or here == there:
        return name
    return os.path.relpath(f"{here}/{name}", there)
