"""``nbdserve image measure``."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    CreateOptionsOption,
    ForceShareOption,
    ImageOptsOption,
    ObjectsOption,
    OutputFormatOption,
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    parsed_size,
)
from nbdserve.cli.image.create import options_help, parse_option_list
from nbdserve.cli.image.sources import opened, source_spec
from nbdserve.cli.output import Output, OutputOption, print_json
from nbdserve.cli.usage import UsageError
from nbdserve.config.secrets import chosen_secret, secrets_of_objects
from nbdserve.errors import ConfigError
from nbdserve.formats.registry import driver_for
from nbdserve.jobs.measure import measurable, measure_bitmaps, measure_empty, measure_node
from nbdserve.units import SECTOR_SIZE, align_up


def measure(
    file: Annotated[
        str | None, typer.Argument(metavar="[FILE]", help="The image that is to be converted.", show_default=False)
    ] = None,
    format_name: Annotated[
        str | None, typer.Option("-f", metavar="FMT", help="Its format. Default: probed.", show_default=False)
    ] = None,
    output_format: OutputFormatOption = "raw",
    size: Annotated[
        str | None, typer.Option("--size", metavar="SIZE", help="Instead of FILE: an empty disk.", show_default=False)
    ] = None,
    options: CreateOptionsOption = None,
    snapshot: Annotated[
        str | None, typer.Option("-l", metavar="SNAPSHOT", help="An internal snapshot of FILE.", show_default=False)
    ] = None,
    output: OutputOption = Output.HUMAN,
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
    force_share: ForceShareOption = False,
    image_root: RootsOption = None,
) -> int:
    """Print how much room a new image takes, made of another, or of nothing, before it is made."""
    driver = driver_for(output_format)
    chosen = parse_option_list(options or [])
    if chosen is None:
        print(options_help(driver), end="")
        return 0
    if file is None and size is None:
        raise UsageError("Either --size N or one filename must be specified.")
    if file is None and (image_opts or format_name is not None or snapshot is not None):
        raise UsageError("--image-opts, -f, and -l require a filename argument.")
    if file is not None and size is not None:
        raise UsageError("--size N cannot be used together with a filename.")
    if not measurable(driver):
        raise ConfigError(f"Block driver '{driver.name}' does not support size measurement")
    bitmaps: int | None = None
    if file is None:
        assert size is not None
        sizes = measure_empty(driver, align_up(parsed_size(size, "image size"), SECTOR_SIZE), chosen)
    else:
        flags = ImageSpec("", format_name, force_share=force_share, secret=chosen_secret(secret_file, secret_env))
        secrets = secrets_of_objects(objects or [])
        spec = source_spec(file, flags, image_opts=image_opts, secrets=secrets, snapshot=snapshot)

        async def of_image() -> tuple[tuple[int, int], int | None]:
            async with opened([spec], image_root or ()) as [node]:
                return await measure_node(driver, node, chosen), await measure_bitmaps(driver, node, chosen)

        sizes, bitmaps = asyncio.run(of_image())
    if output is Output.JSON:
        shown = {} if bitmaps is None else {"bitmaps": bitmaps}
        print_json(shown | {"required": sizes[0], "fully-allocated": sizes[1]})
    else:
        print(f"required size: {sizes[0]}\nfully allocated size: {sizes[1]}")
        if bitmaps is not None:
            print(f"bitmaps size: {bitmaps}")
    return 0
