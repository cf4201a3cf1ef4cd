"""``nbdserve image amend``."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    FormatOption,
    QuietOption,
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    open_layer,
    parsed_size,
    roots_for,
)
from nbdserve.cli.image.create import parse_option_list
from nbdserve.cli.image.resize import resize_image
from nbdserve.cli.usage import UsageError
from nbdserve.config.image_opts import image_from_filename
from nbdserve.config.secrets import chosen_secret
from nbdserve.errors import ConfigError, naming
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import driver_for
from nbdserve.storage.roots import ImageRoots


def amend(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The image.", show_default=False)] = "",
    format_name: FormatOption = None,
    options: Annotated[
        list[str] | None,
        typer.Option("-o", metavar="NAME=VALUE,...", help="What to change; `-o help` lists it.", show_default=False),
    ] = None,
    quiet: QuietOption = False,
    image_root: RootsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
) -> int:
    """Change what was decided when an image was made: its version, its refcounts' width, its backing file, its size."""
    if not options:
        raise UsageError("Must specify options (-o)")
    chosen = parse_option_list(options)
    if chosen is None:
        print(_help(driver_for(format_name or "qcow2")), end="")
        return 0
    if not file:
        raise UsageError("Expecting one image file name")
    spec = image_from_filename(
        file, ImageSpec(file, format_name, discard="unmap", secret=chosen_secret(secret_file, secret_env))
    )
    asyncio.run(_amend(spec, chosen, roots_for(spec.path, image_root)))
    return 0


def _help(driver: type[FormatDriver]) -> str:
    if not driver.can("amend"):
        raise ConfigError(f"Format driver '{driver.name}' does not support option amendment")
    lines = [f"  {option.name + '=<...>':<22} - {option.help}" for option in driver.amend_options]
    return (
        "\n".join([f"Amend options for '{driver.name}':", *lines, f"  {'size=<...>':<22} - Virtual disk size"]) + "\n"
    )


async def _amend(spec: ImageSpec, options: dict[str, str], roots: ImageRoots) -> None:
    size = options.pop("size", None)
    if size is not None:
        parsed_size(size, "image size")
    # Version 2 with snapshots has one size for good.
    downgrade = size is not None and options.get("compat") in ("0.10", "v2")
    await _amend_layer(spec, {} if downgrade else options, roots)
    if size is not None:
        await resize_image(spec, roots, size, shrink=True)
    if downgrade:
        await _amend_layer(spec, options, roots)


async def _amend_layer(spec: ImageSpec, options: dict[str, str], roots: ImageRoots) -> None:
    layer = await open_layer(spec.path, spec.format, roots, writable=True)
    try:
        if not layer.can("amend"):
            raise ConfigError(f"Format driver '{layer.name}' does not support option amendment")
        with naming(spec.path):
            await layer.amend(options)
    finally:
        await layer.close()
