"""``nbdserve image create``."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Annotated

import typer

from nbdserve.block.create import create_files
from nbdserve.cli.image.common import QuietOption, SecretEnvOption, SecretFileOption, full_name, open_layer, parsed_size
from nbdserve.cli.usage import UsageError
from nbdserve.config.secrets import chosen_secret, named_secret, secrets_of_objects
from nbdserve.errors import ConfigError, naming
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.registry import driver_for
from nbdserve.units import SECTOR_SIZE, align_up


def create(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The image to make.", show_default=False)] = "",
    size: Annotated[
        str | None,
        typer.Argument(
            metavar="[SIZE]", help="Bytes, or with K, M, G, T. Default: the backing file's.", show_default=False
        ),
    ] = None,
    format_name: Annotated[str, typer.Option("-f", metavar="FMT", help="Its format.")] = "raw",
    backing: Annotated[
        str | None, typer.Option("-b", metavar="BACKING", help="The backing file.", show_default=False)
    ] = None,
    backing_format: Annotated[
        str | None, typer.Option("-F", metavar="FMT", help="The format of the backing file.", show_default=False)
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "-o", metavar="NAME=VALUE,...", help="Options of the format; `-o help` lists them.", show_default=False
        ),
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option(
            "--object",
            metavar="secret,id=ID,file=FILE",
            help="A passphrase, for `-o encrypt.key-secret=ID`.",
            show_default=False,
        ),
    ] = None,
    secret_file: SecretFileOption = None,
    secret_env: SecretEnvOption = None,
    unchecked: Annotated[bool, typer.Option("-u", help="Do not open the backing file.")] = False,
    quiet: QuietOption = False,
) -> int:
    """Make an image. A file that is there is replaced, unless it is in use."""
    driver = driver_for(format_name)
    chosen = parse_option_list(options or [])
    if chosen is None:
        print(options_help(driver), end="")
        return 0
    if not file:
        raise UsageError("Expecting image file name")
    if backing is not None:
        chosen["backing_file"] = backing
    if backing_format is not None:
        chosen["backing_fmt"] = backing_format
    secret = image_secret(driver, chosen, secrets_of_objects(objects or []), chosen_secret(secret_file, secret_env))
    asyncio.run(_create(driver, file, size, chosen, secret, unchecked=unchecked, quiet=quiet))
    return 0


def image_secret(
    driver: type[FormatDriver], options: dict[str, str], secrets: dict[str, bytes], plain: bytes | None
) -> bytes | None:
    """The passphrase: the one a ``key-secret`` option names, or the one given without a name.

    Never one that nothing is encrypted with: whoever gives it takes the image to be.
    """
    for option in ("encrypt.key-secret", "key-secret"):
        if option in options:
            if plain is not None:
                raise UsageError(f"{option} and --secret-file or --secret-env exclude each other")
            return named_secret(secrets, options[option], option)
    if plain is not None and not any(option.name.endswith("key-secret") for option in driver.create_options):
        raise ConfigError(f"{driver.name} images are never encrypted, and a secret is given")
    return plain


def parse_option_list(texts: list[str]) -> dict[str, str] | None:
    """The options of every ``-o``: ``name=value`` with commas between, a comma in a value doubled; a name alone is on.

    None where help is asked for.
    """
    options: dict[str, str] = {}
    for text in texts:
        for part in text.replace(",,", "\0").split(","):
            item = part.replace("\0", ",")
            if item in ("help", "?"):
                return None
            name, equals, value = item.partition("=")
            if not name:
                raise UsageError(f"-o {text}: an option without a name")
            options[name] = value if equals else "on"
    return options


def options_help(driver: type[FormatDriver]) -> str:
    lines = [f"Supported {driver.name} options:"]
    for option in driver.create_options:
        default = f" (default: {option.default})" if option.default else ""
        lines.append(f"  {option.name + '=<...>':<28} - {option.help}{default}")
    return "\n".join(lines) + "\n"


async def _create(
    driver: type[FormatDriver],
    file: str,
    size: str | None,
    options: dict[str, str],
    secret: bytes | None,
    *,
    unchecked: bool,
    quiet: bool,
) -> None:
    driver.check_option_names(options)
    if "size" in options and size is not None:
        raise ConfigError(f"{file}: The image size must be specified only once")
    wanted = options.pop("size", size)
    backing = options.get("backing_file")
    if backing is not None and options.get("backing_fmt") is None:
        raise ConfigError(f"{file}: Backing file specified without backing format (-F)")
    if backing is None and "backing_fmt" in options:
        raise ConfigError(f"{file}: Backing format cannot be used without backing file (-b)")
    if backing is not None:
        _refuse_same(file, full_name(file, backing), "image and its backing file")
        if unchecked and driver.needs_open_backing:
            raise ConfigError(f"{file}: -u: a {driver.name} image holds the identity of its backing file ({backing})")
    if backing is None or unchecked:
        await _make(driver, file, _size(file, wanted, None), options, None, secret, quiet=quiet)
        return
    # Alone: what its header names stays closed.
    layer = await open_layer(full_name(file, backing), options["backing_fmt"], force_share=True)
    try:
        await _make(driver, file, _size(file, wanted, layer.size), options, layer, secret, quiet=quiet)
    finally:
        await layer.close()


async def _make(
    driver: type[FormatDriver],
    file: str,
    size: int,
    options: dict[str, str],
    backing: FormatDriver | None,
    secret: bytes | None,
    *,
    quiet: bool,
) -> None:
    # Whatever is wrong with the options is found before a file is touched.
    driver.validate_create(size, options)
    if secret is None and driver.encrypts(options):
        raise ConfigError(f"{file}: an encrypted image needs a secret: give --secret-file, --secret-env or --object")
    paths = [file]
    for name in driver.created_companions(file, size, options):
        path = full_name(file, name)
        for other in paths:
            _refuse_same(other, path, "image and its data file")
        if options.get("backing_file"):
            _refuse_same(full_name(file, options["backing_file"]), path, "backing file and the data file")
        paths.append(path)
    if not quiet:
        shown = " ".join(f"{name}={value}" for name, value in options.items())
        print(f"Formatting '{file}', fmt={driver.name} size={size} {shown}".rstrip())
    with naming(file):
        await create_files(driver, paths, size, options, backing=backing, secret=secret)


def _size(file: str, wanted: str | None, backing_size: int | None) -> int:
    if wanted is None:
        if backing_size is None:
            raise ConfigError(f"{file}: Image creation needs a size parameter")
        return backing_size
    return align_up(parsed_size(wanted, "image size"), SECTOR_SIZE)


def _refuse_same(file: str, other: str, what: str) -> None:
    both_exist = Path(file).exists() and Path(other).exists()
    if os.path.realpath(file) == os.path.realpath(other) or (both_exist and Path(file).samefile(other)):
        raise ConfigError(f"{file}: the {what} are the same file")
