"""``nbdserve image snapshot``: internal snapshots."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    FileArgument,
    ForceShareOption,
    FormatOption,
    ImageOptsOption,
    ObjectsOption,
    RootsOption,
    named_image,
    open_layer_of,
    roots_for,
)
from nbdserve.cli.image.info import snapshot_lines
from nbdserve.cli.usage import UsageError
from nbdserve.config.secrets import secrets_of_objects
from nbdserve.errors import ConfigError, ImageError, RequestError, naming
from nbdserve.formats.base import FormatDriver
from nbdserve.storage.roots import ImageRoots


def snapshot(
    file: FileArgument,
    list_them: Annotated[bool, typer.Option("-l", help="List the snapshots; this is the default.")] = False,
    create: Annotated[
        str | None, typer.Option("-c", metavar="NAME", help="Keep the disk as it is now.", show_default=False)
    ] = None,
    apply: Annotated[
        str | None,
        typer.Option(
            "-a", metavar="NAME", help="Make the disk what it was then; NAME may be an id.", show_default=False
        ),
    ] = None,
    delete: Annotated[
        str | None, typer.Option("-d", metavar="NAME", help="Forget the first one of this name.", show_default=False)
    ] = None,
    format_name: FormatOption = None,
    force_share: ForceShareOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing is printed in any case but a list.")] = False,
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    image_root: RootsOption = None,
) -> int:
    """List, create, apply or delete the internal snapshots of an image that nobody is using."""
    actions = [("create", create), ("apply", apply), ("delete", delete)]
    chosen = [(verb, name) for verb, name in actions if name is not None]
    if len(chosen) + list_them > 1:
        raise UsageError("Cannot mix '-l', '-a', '-c', '-d'")
    verb, name = chosen[0] if chosen else ("list", "")
    if verb != "list" and force_share:
        raise UsageError(f"-U goes with -l alone: an image that is in use cannot be changed ({file})")
    flags = ImageSpec(file, format_name, force_share=force_share)
    spec = named_image(file, flags, secrets_of_objects(objects or []), image_opts=image_opts)
    asyncio.run(_snapshot(spec, verb, name, roots_for(spec.path, image_root)))
    return 0


async def _snapshot(spec: ImageSpec, verb: str, name: str, roots: ImageRoots) -> None:
    driver = await open_layer_of(spec, roots, writable=verb != "list")
    try:
        snapshots = driver.info().snapshots
        if verb != "list":
            await _change(driver, verb, name)
        elif snapshots:
            print("\n".join(snapshot_lines(snapshots)))
    finally:
        await driver.close()


async def _change(driver: FormatDriver, verb: str, name: str) -> None:
    try:
        if not driver.can("create_snapshot"):
            raise ConfigError(f"{driver.path}: {driver.name} images have no internal snapshots")
        with naming(driver.path):
            if verb == "create":
                await driver.create_snapshot(name, icount=0)
            elif verb == "apply":
                await driver.apply_snapshot(name)
            else:
                found = next((each.id for each in driver.info().snapshots if each.name == name), None)
                if found is None:
                    raise ConfigError(f"{driver.path}: snapshot not found")
                await driver.delete_snapshot(found)
    except (ConfigError, ImageError, RequestError) as error:
        raise ConfigError(f"Could not {verb} snapshot '{name}': {error}") from error
