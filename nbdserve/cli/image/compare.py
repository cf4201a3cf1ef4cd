"""``nbdserve image compare``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer

from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.boundary import complain
from nbdserve.cli.image.common import (
    ForceShareOption,
    ImageOptsOption,
    ObjectsOption,
    ProgressOption,
    QuietOption,
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    check_cache,
)
from nbdserve.cli.image.progress import run_job
from nbdserve.cli.image.sources import opened, source_spec
from nbdserve.config.secrets import chosen_secret, secrets_of_objects
from nbdserve.errors import NbdserveError
from nbdserve.jobs.compare import CompareJob, first_status_mismatch

DIFFERENT: Final = 1
NOT_OPENED: Final = 2
NO_STATUS: Final = 3
NOT_READ: Final = 4
"""qemu-img's exit codes."""


def compare(
    one: Annotated[str, typer.Argument(metavar="FILE1", help="An image.", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="FILE2", help="Another one.", show_default=False)],
    format_name: Annotated[
        str | None, typer.Option("-f", metavar="FMT", help="Format of FILE1. Default: probed.", show_default=False)
    ] = None,
    other_format: Annotated[
        str | None, typer.Option("-F", metavar="FMT", help="Format of FILE2. Default: probed.", show_default=False)
    ] = None,
    strict: Annotated[bool, typer.Option("-s", help="Sizes and what is allocated have to be equal as well.")] = False,
    cache: Annotated[str, typer.Option("-T", metavar="CACHE", help="Cache mode.")] = "writeback",
    image_opts: ImageOptsOption = False,
    objects: ObjectsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
    force_share: ForceShareOption = False,
    image_root: RootsOption = None,
    progress: ProgressOption = False,
    quiet: QuietOption = False,
) -> int:
    """Look whether two images have the same content; the longer one may go on with zeroes.

    Exit code: 0 they have, 1 they have not, 2 one cannot be opened, 3 or 4 one cannot be read.
    """
    try:
        secrets = secrets_of_objects(objects or [])
        flags = ImageSpec(
            "",
            format_name,
            cache=check_cache(cache, "source cache option"),
            force_share=force_share,
            secret=chosen_secret(secret_file, secret_env),
        )
        specs = [
            source_spec(one, flags, image_opts=image_opts, secrets=secrets),
            source_spec(other, replace(flags, format=other_format), image_opts=image_opts, secrets=secrets),
        ]
        return asyncio.run(
            _compare(specs, image_root or (), strict=strict, progress=progress and not quiet, quiet=quiet)
        )
    except (NbdserveError, OSError) as error:  # 1, the code of other errors, says that the images differ
        complain("nbdserve", error)
        return NOT_OPENED


async def _compare(
    specs: Sequence[ImageSpec], roots: Sequence[Path], *, strict: bool, progress: bool, quiet: bool
) -> int:
    async with opened(specs, roots) as nodes:
        lines, code = await _result(nodes, strict=strict, progress=progress)
        if not quiet:
            print("".join(f"{line}\n" for line in lines), end="")
        return code


async def _result(nodes: list[Node], *, strict: bool, progress: bool) -> tuple[list[str], int]:
    """What there is to be said, and the exit code."""
    one, other = nodes
    if strict and one.size != other.size:
        return ["Strict mode: Image size mismatch!"], DIFFERENT
    job = CompareJob("compare", one, other)
    try:
        status = await first_status_mismatch(one, other) if strict else None
    except (NbdserveError, OSError) as error:
        complain("nbdserve", error)
        return [], NO_STATUS
    try:
        await run_job(job, "Comparing", progress=progress)
    except (NbdserveError, OSError) as error:
        complain("nbdserve", error)
        return [], NOT_READ
    if status is not None and (job.mismatch is None or status <= job.mismatch):
        return [f"Strict mode: Offset {status} block status mismatch!"], DIFFERENT
    shorter = min(one.size, other.size)
    lines = []
    if one.size != other.size and (job.mismatch is None or job.mismatch >= shorter):
        lines.append("Warning: Image size mismatch!")
    if job.mismatch is not None:
        return [*lines, f"Content mismatch at offset {job.mismatch}!"], DIFFERENT
    return [*lines, "Images are identical."], 0
