"""``nbdserve image rebase``."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
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
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    check_cache,
    full_name,
    named_image,
    roots_for,
)
from nbdserve.cli.image.percent import run_shown
from nbdserve.config.secrets import chosen_secret, secrets_of_objects
from nbdserve.errors import ConfigError
from nbdserve.formats.base import BackingReference
from nbdserve.formats.registry import DRIVERS
from nbdserve.jobs.rebase import Rebase
from nbdserve.storage.roots import ImageRoots


def rebase(
    file: FileArgument,
    format_name: FormatOption = None,
    base: Annotated[
        str | None,
        typer.Option(
            "-b",
            metavar="BACKING_FILE",
            help='The new backing file, relative to the directory of the image; "" for none.',
            show_default=False,
        ),
    ] = None,
    base_format: Annotated[
        str | None, typer.Option("-F", metavar="BACKING_FMT", help="Its format.", show_default=False)
    ] = None,
    unsafe: Annotated[
        bool, typer.Option("-u", help="Change the header alone: the new file is known to have the same content.")
    ] = False,
    cache: Annotated[str, typer.Option("-t", metavar="CACHE", help="The cache mode of the image.")] = "writeback",
    source_cache: Annotated[
        str, typer.Option("-T", metavar="SRC_CACHE", help="The cache mode of the backing files.")
    ] = "writeback",
    progress: ProgressOption = False,
    quiet: QuietOption = False,
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    image_root: RootsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
) -> int:
    """Give an image another backing file. Its content stays: what differs between the two is copied into it."""
    if base is None and not unsafe:
        raise ConfigError("Must specify backing file (-b) or use unsafe mode (-u)")
    check_cache(cache, "cache option")
    check_cache(source_cache, "source cache option")
    if base_format is not None and base_format not in DRIVERS:
        raise ConfigError(f"Invalid format name: '{base_format}': there are {', '.join(sorted(DRIVERS))}")
    secret = chosen_secret(secret_file, secret_env)
    # Whatever is copied, the disk stays what it is, and so bitmaps stay right.
    flags = ImageSpec(file, format_name, cache=cache, discard="unmap", secret=secret, keep_bitmaps=True)
    spec = named_image(file, flags, secrets_of_objects(objects or []), image_opts=image_opts)
    reference = BackingReference(base, base_format) if base else None
    roots = roots_for(spec.path, image_root)
    if unsafe:
        asyncio.run(_rename(spec, roots, reference))
    else:
        asyncio.run(_rebase(spec, roots, reference, source_cache, progress=progress and not quiet))
    return 0


async def _rename(spec: ImageSpec, roots: ImageRoots, reference: BackingReference | None) -> None:
    """The header says it, and nothing is compared; the file is opened only where its identity is to be said, too."""
    async with AsyncExitStack() as nodes:
        node = await open_image(replace(spec, backing=None), roots)
        nodes.push_async_callback(node.close)
        _check(node, reference)
        base = None
        if reference is not None and node.top.needs_open_backing:
            below = replace(_base_spec(spec, reference), backing=None)
            base = await open_image(below, roots)
            nodes.push_async_callback(base.close)
        await node.top.set_backing(reference, None if base is None else base.top)


def _base_spec(spec: ImageSpec, reference: BackingReference) -> ImageSpec:
    """How the new backing file is opened."""
    path = full_name(spec.path, reference.name)
    return ImageSpec(path, reference.format, read_only=True, secret=spec.secret)


def _check(node: Node, reference: BackingReference | None) -> None:
    """What is known before anything is read."""
    name = "" if reference is None else reference.name
    problem = f"Could not change the backing file to '{name}'"
    if not node.top.can("set_backing"):
        raise ConfigError(f"{problem}: Operation not supported by {node.format}")
    if reference is not None and reference.format is None and node.top.declares_backing_format:
        raise ConfigError(f"{problem}: backing format must be specified (-F)")
    possible = node.top.backing_formats
    if reference is not None and possible is not None and reference.format not in (None, *possible):
        raise ConfigError(f"{problem}: below a {node.format} image is {' or '.join(possible)}, not {reference.format}")


async def _rebase(
    spec: ImageSpec, roots: ImageRoots, reference: BackingReference | None, source_cache: str, *, progress: bool
) -> None:
    async with AsyncExitStack() as nodes:
        node = await open_image(replace(spec, gets_backing=reference is not None), roots)
        nodes.push_async_callback(node.close)
        _check(node, reference)
        base = None
        if reference is not None:
            base = await open_image(replace(_base_spec(spec, reference), cache=source_cache), roots)
            nodes.push_async_callback(base.close)
            if reference.format is None:
                reference = BackingReference(reference.name, base.format)
        await run_shown(Rebase("rebase", node, base, reference), progress=progress)
