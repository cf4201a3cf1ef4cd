"""``nbdserve image amend``."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated

import typer

from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    FormatOption,
    ImageOptsOption,
    ObjectsOption,
    QuietOption,
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    named_image,
    open_layer_of,
    parsed_size,
    roots_for,
)
from nbdserve.cli.image.create import parse_option_list
from nbdserve.cli.image.resize import resize_image
from nbdserve.cli.usage import UsageError
from nbdserve.config.secrets import chosen_secret, secrets_of_objects
from nbdserve.errors import ConfigError, naming
from nbdserve.formats.base import CreateOption, FormatDriver
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
    image_opts: ImageOptsOption = False,
    image_root: RootsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
    objects: ObjectsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Also when nobody may be able to open it afterwards.")] = False,
) -> int:
    """Change what was decided when an image was made: version, refcounts' width, backing file, size, passphrases."""
    if not options:
        raise UsageError("Must specify options (-o)")
    chosen = parse_option_list(options)
    if chosen is None:
        print(_help(driver_for(format_name or "qcow2")), end="")
        return 0
    if not file:
        raise UsageError("Expecting one image file name")
    flags = ImageSpec(file, format_name, discard="unmap", secret=chosen_secret(secret_file, secret_env))
    secrets = secrets_of_objects(objects or [])
    spec = named_image(file, flags, secrets, image_opts=image_opts)
    keys = _KeyChanges(secrets, force)
    asyncio.run(_amend(spec, chosen, roots_for(spec.path, image_root), keys))
    return 0


@dataclass(frozen=True, slots=True)
class _KeyChanges:
    """What changes of passphrases refer to."""

    secrets: dict[str, bytes]
    force: bool


def _help(driver: type[FormatDriver]) -> str:
    options = [*driver.amend_options, *driver.key_options]
    if not options:
        raise ConfigError(f"Format driver '{driver.name}' does not support option amendment")
    if driver.can("amend"):
        options.append(CreateOption("size", "Virtual disk size"))
    lines = [f"  {option.name + '=<...>':<22} - {option.help}" for option in options]
    return "\n".join([f"Amend options for '{driver.name}':", *lines]) + "\n"


async def _amend(spec: ImageSpec, options: dict[str, str], roots: ImageRoots, keys: _KeyChanges) -> None:
    size = options.pop("size", None)
    if size is not None:
        parsed_size(size, "image size")
    # Version 2 with snapshots has one size for good.
    downgrade = size is not None and options.get("compat") in ("0.10", "v2")
    await _amend_layer(spec, {} if downgrade else options, roots, keys, resizes=size is not None)
    if size is not None:
        await resize_image(spec, roots, size, shrink=True)
    if downgrade:
        await _amend_layer(spec, options, roots, keys)


async def _amend_layer(
    spec: ImageSpec, options: dict[str, str], roots: ImageRoots, keys: _KeyChanges, *, resizes: bool = False
) -> None:
    layer = await open_layer_of(spec, roots, writable=True)
    try:
        names = {option.name for option in layer.key_options}
        changes = {name: value for name, value in options.items() if name in names}
        others = {name: value for name, value in options.items() if name not in names}
        if not layer.can("amend"):
            if not names:
                raise ConfigError(f"Format driver '{layer.name}' does not support option amendment")
            if others or resizes:
                raise ConfigError(f"Invalid parameter '{next(iter(others), 'size')}'")
        if changes and not layer.info().encrypted:
            raise ConfigError(f"{spec.path}: Can't amend encryption options - encryption not present")
        with naming(spec.path):
            if layer.can("amend") and (others or not changes):
                await layer.amend(others)
            if changes:
                await layer.amend_keys(changes, keys.secrets, secret=spec.secret, force=keys.force)
    finally:
        await layer.close()
