"""``nbdserve image bitmap``: the dirty bitmaps stored in an image."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import typer

from nbdserve.bitmaps.bitmap import MAX_NAME, DirtyBitmap
from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.block.tracking import default_granularity
from nbdserve.cli.image.common import (
    ImageOptsOption,
    ObjectsOption,
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    named_image,
    parsed_size,
    roots_for,
)
from nbdserve.cli.lazy import CONTEXT
from nbdserve.cli.option_order import OrderedCommand, given_options
from nbdserve.cli.usage import UsageError
from nbdserve.config.image_opts import image_from_filename
from nbdserve.config.secrets import chosen_secret, secrets_of_objects
from nbdserve.errors import ConfigError
from nbdserve.formats.base import FormatDriver

_ACTIONS: Final = ("--add", "--remove", "--clear", "--enable", "--disable", "--merge")


def bitmap(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE BITMAP", help="The image, and the name of its bitmap.", show_default=False),
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="A new bitmap, which records from now on.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Forget it.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Everything is clean.")] = False,
    enable: Annotated[bool, typer.Option("--enable", help="It records whenever the image is written.")] = False,
    disable: Annotated[bool, typer.Option("--disable", help="It does not.")] = False,
    merge: Annotated[
        list[str] | None,
        typer.Option(
            "--merge", metavar="SOURCE", help="What is dirty in the bitmap SOURCE is dirty.", show_default=False
        ),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            "-g",
            metavar="SIZE",
            help="With --add: bytes one bit stands for. Default: the cluster size, from 4 to 64 KiB.",
            show_default=False,
        ),
    ] = None,
    source_file: Annotated[
        str | None,
        typer.Option(
            "-b", metavar="FILE", help="With --merge: the image that has SOURCE. Default: FILE.", show_default=False
        ),
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("-F", metavar="FMT", help="Its format. Default: probed.", show_default=False)
    ] = None,
    format_name: Annotated[
        str | None, typer.Option("-f", metavar="FMT", help="The format of FILE. Default: probed.", show_default=False)
    ] = None,
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
    image_root: RootsOption = None,
) -> int:
    """Change a dirty bitmap stored in an image that nobody is using.

    Several actions are carried out in the order they are given; when one fails, those before it are done.
    """
    actions = [(option, value) for option, value in given_options(context) if option in _ACTIONS]
    if not actions:
        raise UsageError("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    if granularity is not None and not add:
        raise UsageError("granularity only supported with --add")
    if source_format is not None and source_file is None:
        raise UsageError("-F only supported with -b")
    if source_file is not None and not merge:
        raise UsageError("Merge bitmap source file only supported with --merge")
    if names is None or len(names) != 2:
        raise UsageError("Expecting filename and bitmap name")
    file, name = names
    secrets = secrets_of_objects(objects or [])
    flags = ImageSpec("", format_name, secret=chosen_secret(secret_file, secret_env))
    spec = replace(named_image(file, flags, secrets, image_opts=image_opts), keep_bitmaps=True)
    source = None
    if source_file is not None:
        source = image_from_filename(source_file, replace(flags, format=source_format, read_only=True), secrets)
    bytes_per_bit = 0 if granularity is None else parsed_size(granularity, "granularity")
    asyncio.run(_bitmap(spec, source, name, actions, bytes_per_bit, image_root))
    return 0


app = typer.Typer(add_completion=False)
app.command("bitmap", cls=OrderedCommand, context_settings=CONTEXT)(bitmap)


async def _bitmap(
    spec: ImageSpec,
    source: ImageSpec | None,
    name: str,
    actions: Sequence[tuple[str, str]],
    granularity: int,
    image_root: list[Path] | None,
) -> None:
    async with AsyncExitStack() as files:
        node = await open_image(spec, roots_for(spec.path, image_root))
        files.push_async_callback(node.close)
        merged = node
        if source is not None:
            merged = await open_image(source, roots_for(source.path, image_root))
            files.push_async_callback(merged.close)
        change = _Change(node.top, merged.top, name, granularity, await node.top.stored_bitmap(name))
        try:
            for option, value in actions:
                await change.carry_out(option.removeprefix("--"), value)
        finally:
            if change.is_made:
                await node.top.store_bitmaps({name: change.bitmap})


@dataclass(slots=True)
class _Change:
    """A bitmap as the actions so far have made it."""

    layer: FormatDriver
    source: FormatDriver
    """Where bitmaps to be merged are."""
    name: str
    granularity: int
    """Bytes, of a new one; 0: the default."""
    bitmap: DirtyBitmap | None
    """None: there is none."""
    is_made: bool = False
    """Something is to be stored."""

    async def carry_out(self, action: str, source: str) -> None:
        """One action; what it cannot be done for is a ConfigError with QEMU's text."""
        try:
            if action == "add":
                self.bitmap = await self._new()
            elif self.bitmap is None:
                raise ConfigError(f"Dirty bitmap '{self.name}' not found")
            elif action == "remove":
                # At once: another one of that name would be the last of the image.
                await self.layer.store_bitmaps({self.name: None})
                self.bitmap = None
            elif action == "merge":
                self.bitmap.merge(await self._to_merge(self.bitmap, source))
            else:
                self.bitmap.check_usable()
                if action == "clear":
                    self.bitmap.clear()
                else:
                    self.bitmap.disabled = action == "disable"
        except ConfigError as error:
            raise ConfigError(f"Operation {action} on bitmap {self.name} failed: {error}") from None
        self.is_made = self.bitmap is not None

    async def _new(self) -> DirtyBitmap:
        if self.bitmap is not None:
            raise ConfigError(f"Bitmap already exists: {self.name}")
        if len(os.fsencode(self.name)) > MAX_NAME:
            raise ConfigError(
                f"Can't make bitmap '{self.name}' persistent in '{self.layer.path}': "
                f"Name length exceeds maximum ({MAX_NAME} characters)"
            )
        new = DirtyBitmap(self.name, self.layer.size, self.granularity or default_granularity(self.layer))
        await self.layer.check_new_bitmap(new)
        return new

    async def _to_merge(self, bitmap: DirtyBitmap, name: str) -> DirtyBitmap:
        if self.source is self.layer and name == self.name:
            return bitmap
        found = await self.source.stored_bitmap(name)
        if found is None:
            raise ConfigError(f"Dirty bitmap '{name}' not found")
        found.check_usable(reading=True)
        return found
