"""``nbdserve image commit``."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    FileArgument,
    FormatOption,
    ImageOptsOption,
    ObjectsOption,
    ProgressOption,
    QuietOption,
    RateOption,
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    check_cache,
    full_name,
    named_image,
    parsed_size,
    roots_for,
)
from nbdserve.cli.image.percent import run_shown
from nbdserve.config.secrets import chosen_secret, secrets_of_objects
from nbdserve.errors import ConfigError, naming
from nbdserve.jobs.commit import ActiveCommit
from nbdserve.storage.roots import ImageRoots


def commit(
    file: FileArgument,
    format_name: FormatOption = None,
    base: Annotated[
        str | None,
        typer.Option(
            "-b",
            metavar="BASE",
            help="The layer to write into, any below the image. Default: its backing file. The image is then not "
            "emptied, and layers between are not valid any more.",
            show_default=False,
        ),
    ] = None,
    drop: Annotated[bool, typer.Option("-d", help="Do not empty the image afterwards.")] = False,
    cache: Annotated[str, typer.Option("-t", metavar="CACHE", help="The cache mode.")] = "writeback",
    rate: RateOption = None,
    progress: ProgressOption = False,
    quiet: QuietOption = False,
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    image_root: RootsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
) -> int:
    """Write what an image holds into its backing file, or into one further down, and empty the image."""
    check_cache(cache, "cache option")
    speed = 0 if rate is None else parsed_size(rate, "rate limit")
    flags = ImageSpec(file, format_name, cache=cache, discard="unmap", secret=chosen_secret(secret_file, secret_env))
    spec = named_image(file, flags, secrets_of_objects(objects or []), image_opts=image_opts)
    spec = replace(spec, keep_bitmaps=True)  # emptied, the disk is still the same
    roots = roots_for(spec.path, image_root)
    asyncio.run(_commit(spec, roots, base, speed, drop=drop or base is not None, progress=progress and not quiet))
    if not quiet:
        print("Image committed.")
    return 0


async def _commit(
    spec: ImageSpec, roots: ImageRoots, base: str | None, speed: int, *, drop: bool, progress: bool
) -> None:
    node = await open_image(spec, roots)
    try:
        if len(node.layers) == 1:
            raise ConfigError("Image does not have a backing file")
        index = 1 if base is None else _find(node, base)
        job = ActiveCommit("commit", node, index, auto_complete=True, pivot=False, speed=speed)
        with naming(node.layers[index].path):
            await run_shown(job, progress=progress)
        with naming(node.path):
            if not drop and node.top.can("make_empty"):
                await node.top.make_empty()
    finally:
        with naming(node.path):
            await node.close()


def _find(node: Node, base: str) -> int:
    """The layer the user names: as the header above it does, or by a path."""
    for index, layer in enumerate(node.layers[1:], 1):
        above = node.layers[index - 1]
        if above.backing is not None and above.backing.name == base:
            return index
        if Path(base).exists() and Path(layer.path).exists() and Path(layer.path).samefile(base):
            return index
        if Path(layer.path) == Path(full_name(node.path, base)):
            return index
    raise ConfigError(f"Did not find '{base}' in the backing chain of '{node.path}'")
