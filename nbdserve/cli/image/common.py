"""What the image commands have in common: their options, and opening one layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from nbdserve.block import description
from nbdserve.block.graph import image_roots, open_alone, open_storage
from nbdserve.block.spec import CACHE_MODES, ImageSpec
from nbdserve.config.image_opts import image_from_filename, image_from_opts
from nbdserve.errors import ConfigError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.probe import probe
from nbdserve.storage.base import Storage
from nbdserve.storage.roots import ImageRoots
from nbdserve.units import parse_size

FileArgument: TypeAlias = Annotated[str, typer.Argument(metavar="FILE", help="The image.", show_default=False)]
FormatOption: TypeAlias = Annotated[
    str | None, typer.Option("-f", metavar="FMT", help="Its format. Default: probed.", show_default=False)
]
ForceShareOption: TypeAlias = Annotated[
    bool, typer.Option("--force-share", "-U", help="Open it although another process may be writing it.")
]
RootsOption: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option(
        "--image-root",
        metavar="DIR",
        help="Open the files that image headers name below this directory; may be repeated. "
        "The directory of the image is one in any case.",
        show_default=False,
    ),
]


SecretFileOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--secret-file", metavar="FILE", help="The passphrase of an encrypted image.", show_default=False),
]
SecretEnvOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--secret-env", metavar="NAME", help="The environment variable with the passphrase.", show_default=False
    ),
]


ImageOptsOption: TypeAlias = Annotated[
    bool, typer.Option("--image-opts", help="Images are given as `driver=FMT,file.filename=FILE,...`.")
]
ObjectsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--object", metavar="secret,id=ID,file=FILE", help="A passphrase.", show_default=False),
]
OutputFormatOption: TypeAlias = Annotated[str, typer.Option("-O", metavar="FMT", help="Format of the new image.")]
CreateOptionsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="NAME=VALUE,...", help="As of `create`; `-o help` lists them.", show_default=False),
]
RateOption: TypeAlias = Annotated[
    str | None, typer.Option("-r", metavar="RATE", help="Bytes a second, at most.", show_default=False)
]
ProgressOption: TypeAlias = Annotated[bool, typer.Option("-p", help="Show how far it is.")]
QuietOption: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


def check_cache(mode: str, option: str) -> str:
    """``mode`` if it is one; ConfigError, which calls the option as ``option`` says."""
    if mode not in CACHE_MODES:
        raise ConfigError(f"Invalid {option}: {mode}: use one of {', '.join(CACHE_MODES)}")
    return mode


def parsed_size(text: str, what: str, least: int = 0, most: int | None = None) -> int:
    """The bytes that ``text`` stands for (``parse_size``). ConfigError, which calls them ``what``."""
    try:
        size = parse_size(text)
    except ValueError as error:
        raise ConfigError(f"Invalid {what} specified: {error}") from None
    if size < least or (most is not None and size > most):
        raise ConfigError(f"Invalid {what} specified. Must be between {least} and {most}.")
    return size


full_name = description.full_name


def roots_for(path: str, given: list[Path] | None) -> ImageRoots:
    """The directories in which files named by headers may be."""
    return image_roots(path, given or [])


def named_image(
    text: str, flags: ImageSpec, secrets: Mapping[str, bytes] | None = None, *, image_opts: bool = False
) -> ImageSpec:
    """The image that the command line calls ``text``. ConfigError; ``secrets`` are those of ``--object``, by id."""
    if image_opts and flags.format is not None:
        raise ConfigError("--image-opts and --format are mutually exclusive")
    parse = image_from_opts if image_opts else image_from_filename
    return parse(text, flags, secrets or {})


async def open_layer(
    path: str,
    format_name: str | None,
    roots: ImageRoots | None = None,
    *,
    writable: bool = False,
    force_share: bool = False,
    to_check: bool = False,
) -> FormatDriver:
    """``open_layer_of`` the image that the command line calls ``path``."""
    spec = named_image(path, ImageSpec(path, format_name, force_share=force_share))
    return await open_layer_of(spec, roots, writable=writable, to_check=to_check)


async def open_layer_of(
    spec: ImageSpec, roots: ImageRoots | None = None, *, writable: bool = False, to_check: bool = False
) -> FormatDriver:
    """One image by itself; its backing file stays closed, and, unless it is ``to_check``, what holds only guest data.

    The driver is read-only in any case; ``writable`` opens the files for a repair. ``close`` it.
    """
    if spec.file is not None:
        raise ConfigError(f"image {spec.path!r}: an image within an image is not supported here")
    if spec.offset or spec.size is not None:
        raise ConfigError(f"image {spec.path!r}: offset and size are not supported here, the whole file is looked at")
    storage = await open_storage(spec, read_only=not writable)
    return await open_layer_on(storage, spec.format, roots, force_share=spec.force_share, to_check=to_check)


async def open_layer_on(
    storage: Storage,
    format_name: str | None,
    roots: ImageRoots | None = None,
    *,
    force_share: bool = False,
    to_check: bool = False,
) -> FormatDriver:
    """``open_layer`` on an open file, which is closed when this fails."""
    try:
        name = format_name or await probe(storage)
    except BaseException:
        await storage.close()
        raise
    return await open_alone(storage, name, roots, force_share=force_share, to_check=to_check)
