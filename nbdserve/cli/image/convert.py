"""``nbdserve image convert``."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import typer

from nbdserve.block.graph import image_roots, open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.image.common import (
    CreateOptionsOption,
    ForceShareOption,
    ImageOptsOption,
    ObjectsOption,
    OutputFormatOption,
    ProgressOption,
    QuietOption,
    RateOption,
    RootsOption,
    SecretEnvOption,
    SecretFileOption,
    check_cache,
    full_name,
    parsed_size,
)
from nbdserve.cli.image.create import image_secret, options_help, parse_option_list
from nbdserve.cli.image.progress import run_job
from nbdserve.cli.image.sources import STREAM, opened, source_spec
from nbdserve.cli.image.stream import StreamTarget
from nbdserve.cli.usage import UsageError
from nbdserve.config.image_opts import image_from_filename, image_from_opts
from nbdserve.config.secrets import chosen_secret, secrets_of_objects
from nbdserve.errors import ConfigError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import driver_for
from nbdserve.jobs.bitmap_copy import check_bitmap_target, copy_bitmaps, copyable_bitmaps
from nbdserve.jobs.convert import CommonBase, ConvertJob, layers_above
from nbdserve.jobs.copy import CopyOptions, unit_for
from nbdserve.jobs.target import NewImage, TargetImage
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB, SECTOR_SIZE

_MOST_SPARSE: Final = 16 * MIB


@dataclass(frozen=True, slots=True)
class _Request:
    """What is to be converted into what."""

    sources: Sequence[ImageSpec]
    target: ImageSpec
    """With the format that ``-O`` gives."""
    options: dict[str, str]
    secret: bytes | None
    base: str | None
    skip_create: bool
    compress: bool
    copy: CopyOptions
    zeroed: bool
    bitmaps: bool
    skip_broken_bitmaps: bool
    speed: int
    progress: bool
    quiet: bool
    roots: Sequence[Path]


def convert(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE... TARGET",
            help="The images, whose disks are put one behind the other, and the image to make. `-` is standard input, "
            "or standard output for a raw image.",
            show_default=False,
        ),
    ] = None,
    format_name: Annotated[
        str | None, typer.Option("-f", metavar="FMT", help="Format of the images. Default: probed.", show_default=False)
    ] = None,
    output_format: OutputFormatOption = "raw",
    base: Annotated[
        str | None,
        typer.Option(
            "-B",
            metavar="BASE",
            help="Keep copy-on-write: the new image has this backing file, and only what is allocated above it in the "
            "source is copied. It should have the content of the source's base.",
            show_default=False,
        ),
    ] = None,
    base_format: Annotated[
        str | None,
        typer.Option(
            "-F",
            metavar="FMT",
            help="Format of BASE. Default: known where BASE is a layer of the source.",
            show_default=False,
        ),
    ] = None,
    options: CreateOptionsOption = None,
    compress: Annotated[bool, typer.Option("-c", help="Compress the data, on all processors.")] = False,
    sparse: Annotated[
        str,
        typer.Option("-S", metavar="SIZE", help="Leave out runs of zeroes of this length; 0: write everything."),
    ] = "4k",
    skip_create: Annotated[bool, typer.Option("-n", help="The target is there already: write into it.")] = False,
    target_is_zero: Annotated[
        bool, typer.Option("--target-is-zero", help="With -n: it reads as zeroes, so none are written.")
    ] = False,
    out_of_order: Annotated[bool, typer.Option("-W", help="Let writes overtake each other.")] = False,
    requests: Annotated[int, typer.Option("-m", metavar="N", help="Requests in flight, 1 to 16.")] = 8,
    rate: RateOption = None,
    cache: Annotated[
        str,
        typer.Option(
            "-t",
            metavar="CACHE",
            help="Cache mode of the target. With `unsafe` the new image is not synced, unless it replaces a file.",
        ),
    ] = "unsafe",
    source_cache: Annotated[str, typer.Option("-T", metavar="CACHE", help="Cache mode of the images.")] = "writeback",
    snapshot: Annotated[
        str | None,
        typer.Option(
            "-l", metavar="SNAPSHOT", help="Convert this internal snapshot: an id or name.", show_default=False
        ),
    ] = None,
    salvage: Annotated[bool, typer.Option("--salvage", help="What cannot be read becomes zeroes.")] = False,
    bitmaps: Annotated[bool, typer.Option("--bitmaps", help="Copy the dirty bitmaps stored in FILE, too.")] = False,
    skip_broken_bitmaps: Annotated[
        bool, typer.Option("--skip-broken-bitmaps", help="With --bitmaps: leave out those that are inconsistent.")
    ] = False,
    image_opts: ImageOptsOption = False,
    target_image_opts: Annotated[bool, typer.Option("--target-image-opts", help="So is the target; with -n.")] = False,
    objects: ObjectsOption = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
    force_share: ForceShareOption = False,
    image_root: RootsOption = None,
    progress: ProgressOption = False,
    quiet: QuietOption = False,
) -> int:
    """Copy the disk of an image into a new image, of any format, or keep it a copy-on-write image of BASE.

    The new image gets its name when it is complete: whatever happens before, a file of that name stays as it is. The
    source is never changed. BASE, like every backing file, is named as seen from the new image.
    """
    chosen = parse_option_list(options or [])
    if chosen is None:
        print(options_help(driver_for(output_format)), end="")
        return 0
    *names, target_name = files or [""]
    if not names:
        raise UsageError("Must specify image file name")
    secrets = secrets_of_objects(objects or [])
    if base is not None and len(names) > 1:
        raise ConfigError("-B makes no sense when concatenating multiple input images")
    if skip_broken_bitmaps and not bitmaps:
        raise UsageError("Use of --skip-broken-bitmaps requires --bitmaps")
    if bitmaps and len(names) > 1:
        raise ConfigError("Copying bitmaps only possible with single source")
    if target_is_zero and not skip_create:
        raise UsageError("--target-is-zero requires use of -n flag")
    if target_image_opts and not skip_create:
        raise UsageError("--target-image-opts requires use of -n flag")
    if not 1 <= requests <= 16:
        raise UsageError("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
    if skip_create and chosen:
        print("nbdserve: warning: -o has no effect when skipping image creation", file=sys.stderr)
    if base is not None:
        chosen["backing_file"] = base
    if base_format is not None:
        chosen["backing_fmt"] = base_format
    flags = ImageSpec(
        "",
        format_name,
        cache=check_cache(source_cache, "source cache option"),
        force_share=force_share,
        secret=chosen_secret(secret_file, secret_env),
    )
    parse = image_from_opts if target_image_opts else image_from_filename
    target_flags = ImageSpec(
        "", None if target_image_opts else output_format, cache=check_cache(cache, "output cache option")
    )
    request = _Request(
        sources=[source_spec(name, flags, image_opts=image_opts, secrets=secrets, snapshot=snapshot) for name in names],
        target=replace(parse(target_name, target_flags, secrets), discard="unmap"),
        options=chosen,
        secret=None if skip_create else image_secret(driver_for(output_format), chosen, secrets, None),
        base=chosen.get("backing_file"),
        skip_create=skip_create,
        compress=compress,
        copy=CopyOptions(
            requests=requests,
            sparse=_sparse(sparse),
            in_order=not out_of_order,
            skip_errors=_warn if salvage else None,
        ),
        zeroed=target_is_zero,
        bitmaps=bitmaps,
        skip_broken_bitmaps=skip_broken_bitmaps,
        speed=0 if rate is None else parsed_size(rate, "rate limit"),
        progress=progress and not quiet,
        quiet=quiet,
        roots=image_root or (),
    )
    asyncio.run(_convert(request))
    return 0


def _sparse(text: str) -> int:
    size = parsed_size(text, "sparse size")
    if size % SECTOR_SIZE or size > _MOST_SPARSE:
        raise ConfigError(
            f"Invalid buffer size for sparse output specified. Valid sizes are multiples of {SECTOR_SIZE} up to "
            f"{_MOST_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return size


def _warn(offset: int, length: int, error: Exception) -> None:
    reason = (isinstance(error, OSError) and error.strerror) or error
    print(f"nbdserve: warning: error while reading offset {offset}: {reason}", file=sys.stderr)


def _skip_broken(name: str) -> None:
    print(f"nbdserve: warning: Skipping inconsistent bitmap '{name}'", file=sys.stderr)


async def _convert(request: _Request) -> None:
    async with opened(request.sources, request.roots) as nodes:
        size = sum(node.size for node in nodes)
        bitmaps: list[str] | None = None
        if request.bitmaps:
            bitmaps = await copyable_bitmaps(nodes[0].top, _skip_broken if request.skip_broken_bitmaps else None)
        if request.target.path == STREAM:
            await _to_stream(request, nodes)
        elif request.skip_create:
            await _into_existing(request, nodes, size, bitmaps)
        else:
            await _into_new(request, nodes, size, bitmaps)


async def _into_new(request: _Request, nodes: list[Node], size: int, bitmaps: list[str] | None) -> None:
    assert request.target.format is not None
    if request.target.nbd is not None:
        raise ConfigError(f"{request.target.path}: an export of an NBD server is there already: give -n")
    driver = driver_for(request.target.format)
    driver.check_option_names(request.options)
    if "size" in request.options:
        raise ConfigError(f"{request.target.path}: the new image has the size of its sources, and -o gives another")
    if request.compress and not _compresses(driver):
        raise ConfigError("Compression not supported for this file format")
    options, base, common = dict(request.options), None, None
    if request.base is not None:
        base, common = await _common_base(request, nodes[0])
        options["backing_fmt"] = base.format or ""
    elif "backing_fmt" in options:
        raise ConfigError(f"{request.target.path}: Backing format cannot be used without backing file (-B)")
    image = NewImage(
        request.target.path, driver, size, options, base, request.secret, request.target.cache, request.roots
    )
    async with TargetImage(image) as target:
        if bitmaps is not None:
            await check_bitmap_target(target.node.top, bitmaps)
        await _copy(request, nodes, target.node, common, zeroed=target.zeroed)
        await copy_bitmaps(nodes[0].top, target.node.top, bitmaps or [])
        await target.publish()


async def _common_base(request: _Request, node: Node) -> tuple[ImageSpec, CommonBase]:
    """The base as it is to be opened, in the format given or known, and what the source has above it."""
    assert request.base is not None
    path = full_name(request.target.path, request.base)
    status = await asyncio.to_thread(os.stat, path)
    above = layers_above(node, (status.st_dev, status.st_ino))
    form = request.options.get("backing_fmt")
    if form is None and above < len(node.layers):
        layer = node.layers[above]
        if isinstance(layer.storage, FileStorage) and layer.storage.identity == (status.st_dev, status.st_ino):
            form = layer.name
    if form is None:
        raise ConfigError(f"{request.base}: Use of backing file requires explicit backing format (-F)")
    spec = ImageSpec(path, form, read_only=True, force_share=request.sources[0].force_share)
    base = await open_image(spec, image_roots(path, request.roots))
    try:
        return spec, CommonBase(above, base.size)
    finally:
        await base.close()


async def _into_existing(request: _Request, nodes: list[Node], size: int, bitmaps: list[str] | None) -> None:
    if bitmaps is not None:
        async with opened([replace(request.target, read_only=True)], request.roots) as [found]:
            await check_bitmap_target(found.top, bitmaps)
    target = await open_image(request.target, image_roots(request.target.path, request.roots))
    async with AsyncExitStack() as files:
        files.push_async_callback(target.close)
        if target.size < size:
            raise ConfigError(f"{target.path}: Output file is smaller than input file")
        if request.compress and not _compresses(type(target.top)):
            raise ConfigError("Compression not supported for this file format")
        common = None
        if request.base is not None:
            _, common = await _common_base(request, nodes[0])
        await _copy(request, nodes, target, common, zeroed=request.zeroed)
        await copy_bitmaps(nodes[0].top, target.top, bitmaps or [])
        await target.flush()


async def _copy(request: _Request, nodes: list[Node], target: Node, common: CommonBase | None, *, zeroed: bool) -> None:
    top = target.top
    copy = replace(request.copy, zeroed=zeroed, unit=unit_for(top.granularity, request.copy.sparse))
    if common is not None and not top.zeroes_fast:
        copy = replace(copy, write_zeroes=True)
    if request.compress or top.compressed_only:
        copy = replace(
            copy, unit=top.cluster_size, compress=target.write_compressed, in_order=True, sequential=top.compressed_only
        )
    job = ConvertJob("convert", nodes, target, copy, base=common, speed=request.speed)
    await run_job(job, "Converting", progress=request.progress)


def _compresses(driver: type[FormatDriver]) -> bool:
    return driver.can("write_compressed")


async def _to_stream(request: _Request, nodes: list[Node]) -> None:
    if request.bitmaps:
        raise ConfigError("Format driver 'raw' does not support bitmaps")
    if request.target.format != "raw" or request.compress or request.base is not None or request.skip_create:
        raise ConfigError("standard output takes a raw image, from its beginning to its end: leave out -O, -c, -B, -n")
    target = StreamTarget(sys.stdout.buffer)
    copy = replace(request.copy, sparse=4 * KIB, in_order=True, sequential=True)
    await run_job(
        ConvertJob("convert", nodes, target, copy, speed=request.speed), "Converting", progress=request.progress
    )
