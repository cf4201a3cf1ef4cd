"""``nbdserve image dd``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    ForceShareOption,
    ImageOptsOption,
    ObjectsOption,
    OutputFormatOption,
    ProgressOption,
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    parsed_size,
)
from nbdserve.cli.image.progress import run_job
from nbdserve.cli.image.sources import opened, source_spec
from nbdserve.cli.usage import UsageError
from nbdserve.config.image_opts import image_from_filename
from nbdserve.config.secrets import chosen_secret, secrets_of_objects
from nbdserve.errors import ConfigError
from nbdserve.formats.registry import driver_for
from nbdserve.jobs.convert import ConvertJob
from nbdserve.jobs.copy import CopyOptions, unit_for
from nbdserve.jobs.target import NewImage, TargetImage

_MOST_BYTES: Final = (1 << 31) - 1
_MOST_BLOCKS: Final = (1 << 63) - 1
"""QEMU's limits."""


@dataclass(slots=True)
class _Operands:
    source: str = ""
    target: str = ""
    block: int = 512
    count: int | None = None
    skip: int = 0


def dd(
    operands: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="if=FILE of=FILE [bs=SIZE] [count=BLOCKS] [skip=BLOCKS]",
            help="What to copy, and where: BLOCKS of SIZE bytes each, after those that are skipped.",
            show_default=False,
        ),
    ] = None,
    format_name: Annotated[
        str | None, typer.Option("-f", metavar="FMT", help="Format of the image. Default: probed.", show_default=False)
    ] = None,
    output_format: OutputFormatOption = "raw",
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
    force_share: ForceShareOption = False,
    image_root: RootsOption = None,
    progress: ProgressOption = False,
) -> int:
    """Copy a part of the disk of an image to a new image, which has the size of that part.

    The new image gets its name when it is complete; a file of that name stays as it is until then.
    """
    parsed = parse_operands(operands or [])
    flags = ImageSpec("", format_name, force_share=force_share, secret=chosen_secret(secret_file, secret_env))
    secrets = secrets_of_objects(objects or [])
    source = source_spec(parsed.source, flags, image_opts=image_opts, secrets=secrets)
    target = image_from_filename(parsed.target, ImageSpec("", output_format))
    if target.nbd is not None:
        raise ConfigError(f"{target.path}: an export of an NBD server is there already: use convert -n")
    asyncio.run(_dd(source, target.path, output_format, parsed, image_root or (), progress=progress))
    return 0


def parse_operands(words: Sequence[str]) -> _Operands:
    """The operands, each ``name=value``."""
    parsed = _Operands()
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in ("if", "of", "bs", "count", "skip"):
            raise UsageError(f"unrecognized operand {name}")
        if name == "if":
            parsed.source = value
        elif name == "of":
            parsed.target = value
        elif name == "bs":
            parsed.block = parsed_size(value, "bs", 1, _MOST_BYTES)
        elif name == "count":
            parsed.count = parsed_size(value, "count", 0, _MOST_BLOCKS)
        else:
            parsed.skip = parsed_size(value, "skip", 0, _MOST_BLOCKS)
    if not parsed.source or not parsed.target:
        raise UsageError("Must specify both input and output files")
    return parsed


async def _dd(
    source: ImageSpec, target: str, form: str, operands: _Operands, roots: Sequence[Path], *, progress: bool
) -> None:
    driver = driver_for(form)
    async with opened([source], roots) as [node]:
        start = operands.skip * operands.block
        if start > node.size:
            raise ConfigError(f"{node.path}: cannot skip to specified offset")
        end = node.size if operands.count is None else min(node.size, start + operands.count * operands.block)
        image = NewImage(target, driver, end - start, {}, roots=roots)
        async with TargetImage(image) as made:
            options = CopyOptions(zeroed=made.zeroed, unit=unit_for(made.node.top.granularity, 4096))
            job = ConvertJob("dd", [node], made.node, options, window=(start, end))
            await run_job(job, "Copying", progress=progress)
            await made.publish()
