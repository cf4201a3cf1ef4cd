"""``nbdserve image check``."""

from __future__ import annotations

import asyncio
import sys
from enum import StrEnum
from typing import Annotated, Any, Final

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
from nbdserve.cli.output import Output, OutputOption, print_json
from nbdserve.config.secrets import secrets_of_objects
from nbdserve.formats.base import CheckResult
from nbdserve.storage.roots import ImageRoots

FAILED: Final = 1
CORRUPT: Final = 2
LEAKS: Final = 3
UNSUPPORTED: Final = 63
"""qemu-img's exit codes."""


class Repair(StrEnum):
    """What to repair."""

    LEAKS = "leaks"
    ALL = "all"


def check(
    file: FileArgument,
    format_name: FormatOption = None,
    repair: Annotated[
        Repair | None, typer.Option("-r", help="Repair leaked clusters, or all that can be.", show_default=False)
    ] = None,
    output: OutputOption = Output.HUMAN,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only problems.")] = False,
    force_share: ForceShareOption = False,
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    image_root: RootsOption = None,
) -> int:
    """Look whether the metadata of an image are consistent.

    Exit code: 0 yes, 1 the check failed, 2 corruption found, 3 only leaked clusters found, 63 the format has no check.
    """
    flags = ImageSpec(file, format_name, force_share=force_share)
    spec = named_image(file, flags, secrets_of_objects(objects or []), image_opts=image_opts)
    return asyncio.run(_check(file, spec, repair, output, roots_for(spec.path, image_root), quiet=quiet))


async def _check(
    file: str, spec: ImageSpec, repair: Repair | None, output: Output, roots: ImageRoots, *, quiet: bool
) -> int:
    driver = await open_layer_of(spec, roots, writable=repair is not None, to_check=True)
    try:
        if not driver.can("check"):
            print("nbdserve: This image format does not support checks", file=sys.stderr)
            return UNSUPPORTED
        result = await driver.check(repair_leaks=repair is not None, repair_errors=repair is Repair.ALL)
    finally:
        await driver.close()
    for message in result.messages:
        print(message, file=sys.stderr)
    if output is Output.JSON:
        print_json(as_json(result) | {"filename": file, "format": driver.name})
    elif not quiet:
        print(as_text(result), end="")
    if result.check_errors:
        print("nbdserve: Check failed", file=sys.stderr)
        return FAILED
    if result.corruptions:
        return CORRUPT
    return LEAKS if result.leaks else 0


def as_json(result: CheckResult) -> dict[str, Any]:
    """The object qemu-img prints: counters that are 0 are left out."""
    always = {
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "check-errors": result.check_errors,
    }
    if not result.total_clusters:
        del always["total-clusters"]
    found = {
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
        "corruptions": result.corruptions,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks": result.leaks,
        "leaks-fixed": result.leaks_fixed,
    }
    return always | {name: count for name, count in found.items() if count}


def as_text(result: CheckResult) -> str:
    """The same for people."""
    lines: list[str] = []
    if result.leaks_fixed or result.corruptions_fixed:
        lines += [
            "The following inconsistencies were found and repaired:\n",
            f"    {result.leaks_fixed} leaked clusters",
            f"    {result.corruptions_fixed} corruptions\n",
            "Double checking the fixed image now...",
        ]
    if not (result.corruptions or result.leaks or result.check_errors):
        lines.append("No errors were found on the image.")
    if result.corruptions:
        lines.append(f"\n{result.corruptions} errors were found on the image.")
        lines.append("Data may be corrupted, or further writes to the image may corrupt it.")
    if result.leaks:
        lines.append(f"\n{result.leaks} leaked clusters were found on the image.")
        lines.append("This means waste of disk space, but no harm to data.")
    if result.check_errors:
        lines.append(f"\n{result.check_errors} internal errors have occurred during the check.")
    allocated = result.allocated_clusters
    if result.total_clusters and allocated:
        lines.append(
            f"{allocated}/{result.total_clusters} = {allocated / result.total_clusters:.2%} allocated, "
            f"{result.fragmented_clusters / allocated:.2%} fragmented, "
            f"{result.compressed_clusters / allocated:.2%} compressed clusters"
        )
    lines.append(f"Image end offset: {result.image_end_offset}")
    return "\n".join(lines) + "\n"
