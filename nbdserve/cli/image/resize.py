"""``nbdserve image resize``."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import Annotated, Final

import typer

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    FileArgument,
    FormatOption,
    ImageOptsOption,
    ObjectsOption,
    QuietOption,
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    named_image,
    parsed_size,
    roots_for,
)
from nbdserve.config.secrets import chosen_secret, secrets_of_objects
from nbdserve.errors import ConfigError, naming
from nbdserve.storage.roots import ImageRoots

PREALLOCATION: Final = ("off", "metadata", "falloc", "full")


def resize(
    file: FileArgument,
    size: Annotated[
        str,
        typer.Argument(
            metavar="[+|-]SIZE", help="Bytes, or with K, M, G, T; + and - are relative.", show_default=False
        ),
    ],
    format_name: FormatOption = None,
    shrink: Annotated[bool, typer.Option("--shrink", help="Agree to lose what is past a smaller size.")] = False,
    preallocation: Annotated[
        str,
        typer.Option(
            "--preallocation", metavar="MODE", help="Give new space its place: off, metadata, falloc or full."
        ),
    ] = "off",
    quiet: QuietOption = False,
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    image_root: RootsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
) -> int:
    """Change the size of an image's disk. What it grows by reads as zeroes; partitions stay as they are."""
    if preallocation not in PREALLOCATION:
        raise ConfigError(f"Invalid preallocation mode '{preallocation}': use one of {', '.join(PREALLOCATION)}")
    flags = ImageSpec(file, format_name, discard="unmap", secret=chosen_secret(secret_file, secret_env))
    spec = named_image(file, flags, secrets_of_objects(objects or []), image_opts=image_opts)
    asyncio.run(resize_image(spec, roots_for(spec.path, image_root), size, preallocation, shrink=shrink))
    if not quiet:
        print("Image resized.")
    return 0


async def resize_image(
    spec: ImageSpec, roots: ImageRoots, size_text: str, preallocation: str = "off", *, shrink: bool
) -> None:
    """Give the image the size written as on the command line. ConfigError."""
    sign = size_text[:1] if size_text[:1] in ("+", "-") else ""
    amount = parsed_size(size_text.removeprefix(sign), "image size")
    node = await open_image(replace(spec, keep_bitmaps=True), roots)
    try:
        top, old = node.top, node.size
        size = {"+": old + amount, "-": old - amount}.get(sign, amount)
        if size <= 0:
            raise ConfigError(f"{spec.path}: New image size must be positive, not {size}")
        if size <= old and preallocation != "off":
            raise ConfigError(f"{spec.path}: Preallocation can only be used for growing images, and it has {old} bytes")
        if not top.can("resize"):
            raise ConfigError(f"{spec.path}: Image format driver does not support resize: {top.name}")
        if preallocation != "off" and preallocation not in top.preallocation_modes:
            raise ConfigError(f"{spec.path}: Unsupported preallocation mode: {preallocation}, of {top.name}")
        if size < old and not shrink:
            print(
                "nbdserve: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before "
                "performing such an operation, make sure there is no important data there.",
                file=sys.stderr,
            )
            raise ConfigError(
                f"{spec.path}: Use the --shrink option to perform a shrink operation, from {old} to {size} bytes"
            )
        with naming(spec.path):
            await node.resize(size)
            if preallocation != "off":
                await _preallocate(node, old, preallocation)
    finally:
        with naming(spec.path):
            await node.close()


async def _preallocate(node: Node, old: int, mode: str) -> None:
    """All of the new space, or the old size again."""
    try:
        await node.top.preallocate(old, node.size, mode)
    except BaseException:
        await node.resize(old)
        raise
