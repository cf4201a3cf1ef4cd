"""``nbdserve serve``: images over NBD, with qemu-nbd's option names for what qemu-nbd has."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError

from nbdserve.app import ExportPlan, Plan, exports_of, plan_of, run
from nbdserve.cli.daemon import fork_until_ready
from nbdserve.cli.usage import UsageError
from nbdserve.config.load import load
from nbdserve.config.models import Config, ExportOptions, ServerOptions, help_of
from nbdserve.server.addresses import DEFAULT_PORT, Address, TcpAddress, parse_address, parse_port, unix_address
from nbdserve.server.listeners import inherited

_NAMED: Final = re.compile(r"([^/=:{}]+)=(.+)", re.DOTALL)

_ADDRESS: Final = re.compile(r"unix:.*|[^/]*:\d+", re.DOTALL)

_DEFAULT_HOST: Final = "127.0.0.1"


def _image_option(name: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help_of(ExportOptions, name), rich_help_panel="Image", show_default=False)


def _server_option(name: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help_of(ServerOptions, name), rich_help_panel="Server", show_default=False)


def _listen_option(help_: str, *flags: str) -> Any:
    return typer.Option(*flags, help=help_, rich_help_panel="Listen", show_default=False)


def serve(
    *,
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE",
            help="Image files; NAME=FILE gives the export a name, else it has the file's. NBD URIs and json:{...} as "
            "QEMU takes them.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration file.", show_default=False)
    ] = None,
    format_: Annotated[str | None, _image_option("format", "--format", "-f")] = None,
    read_only: Annotated[bool | None, _image_option("read_only", "--read-only", "-r")] = None,
    export_name: Annotated[
        str | None,
        typer.Option(
            "--export-name",
            "-x",
            metavar="NAME",
            help="The name of the export; with several images, which of them is the default.",
            rich_help_panel="Image",
            show_default=False,
        ),
    ] = None,
    description: Annotated[str | None, _image_option("description", "--description", "-D")] = None,
    allocation_depth: Annotated[bool | None, _image_option("allocation_depth", "--allocation-depth", "-A")] = None,
    bitmap: Annotated[list[str] | None, _image_option("bitmaps", "--bitmap", "-B")] = None,
    load_snapshot: Annotated[str | None, _image_option("snapshot", "--load-snapshot", "-l")] = None,
    overlay: Annotated[bool | None, _image_option("overlay", "--snapshot", "-s")] = None,
    offset: Annotated[str | None, _image_option("offset", "--offset", "-o")] = None,
    size: Annotated[str | None, _image_option("size", "--size")] = None,
    backing: Annotated[str | None, _image_option("backing", "--backing")] = None,
    cache: Annotated[str | None, _image_option("cache", "--cache")] = None,
    discard: Annotated[str | None, _image_option("discard", "--discard")] = None,
    detect_zeroes: Annotated[str | None, _image_option("detect_zeroes", "--detect-zeroes")] = None,
    secret_file: Annotated[str | None, _image_option("secret_file", "--secret-file")] = None,
    secret_env: Annotated[str | None, _image_option("secret_env", "--secret-env")] = None,
    unlock_seconds: Annotated[float | None, _image_option("unlock_seconds", "--unlock-seconds")] = None,
    socket: Annotated[list[str] | None, _listen_option("Unix socket; @name is abstract.", "--socket", "-k")] = None,
    bind: Annotated[
        list[str] | None, _listen_option(f"TCP address, * for all. Default: {_DEFAULT_HOST}.", "--bind", "-b")
    ] = None,
    port: Annotated[
        str | None, _listen_option(f"TCP port, 0: any free one. Default: {DEFAULT_PORT}.", "--port", "-p")
    ] = None,
    shared: Annotated[int | None, _server_option("max_clients", "--shared", "-e")] = None,
    persistent: Annotated[
        bool | None,
        typer.Option(
            "--persistent/--exit-last",
            "-t",
            help="Go on when the last client that used an export has left (default), or exit then.",
            rich_help_panel="Server",
            show_default=False,
        ),
    ] = None,
    admin: Annotated[
        list[str] | None,
        typer.Option(
            "--admin",
            metavar="SOCK",
            help="Unix socket, or 127.0.0.1:PORT, where QMP clients (nbdserve admin, qmp-shell) drive the server.",
            rich_help_panel="Server",
            show_default=False,
        ),
    ] = None,
    image_root: Annotated[list[str] | None, _server_option("image_roots", "--image-root")] = None,
    fork: Annotated[
        bool, typer.Option("--fork", help="Return when clients can connect.", rich_help_panel="Server")
    ] = False,
    pid_file: Annotated[str | None, _server_option("pid_file", "--pid-file")] = None,
) -> int:
    """Serve images over NBD, and print the URIs to connect to."""
    listeners = inherited(os.environ)
    if listeners and (socket or bind or port):
        raise UsageError("the sockets are inherited (LISTEN_FDS); leave out --socket, --bind and --port")
    settings = load(config) if config is not None else Config()
    image_options = _given(
        format=format_,
        read_only=read_only,
        description=description,
        allocation_depth=allocation_depth,
        bitmaps=bitmap,
        snapshot=load_snapshot,
        overlay=overlay,
        offset=offset,
        size=size,
        backing=backing,
        cache=cache,
        discard=discard,
        detect_zeroes=detect_zeroes,
        secret_file=secret_file,
        secret_env=secret_env,
        unlock_seconds=unlock_seconds,
    )
    server_options = _given(
        listen=_listen(socket or [], bind or [], port) or None,
        default_export=export_name if len(images or []) != 1 else None,
        image_roots=image_root,
        max_clients=shared,
        exit_last=None if persistent is None else not persistent,
        pid_file=pid_file,
    )
    if image_options and not images:
        raise UsageError(f"{_flag(next(iter(image_options)))} describes an IMAGE, and none is given")
    exports = exports_of(settings) + [
        _export(image, export_name if len(images or []) == 1 else None, image_options, shared) for image in images or []
    ]
    admin_addresses = settings.admin.addresses() if admin is None else [_admin_address(text) for text in admin]
    if not exports and not admin_addresses:
        raise UsageError("nothing to serve: give an IMAGE, or a configuration file that has [exports.NAME], or --admin")
    server = _validated(ServerOptions, settings.server.model_dump() | server_options)
    if not (listeners or server.listen or admin_addresses):
        raise UsageError("nobody could connect: give an address to listen on, or --admin")
    return start(plan_of(server, exports, listeners, admin_addresses, settings.admin.roots), fork=fork)


def start(plan: Plan, *, fork: bool = False) -> int:
    """Run the plan, printing the URI of each export at each address once clients can connect."""
    forked = fork_until_ready() if fork else None

    def ready(addresses: list[Address]) -> None:
        for uri in dict.fromkeys(address.uri(export.name) for export in plan.exports for address in addresses):
            print(uri, flush=True)
        if forked is not None:
            forked()

    return run(plan, ready)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _listen(sockets: list[str], hosts: list[str], port: str | None) -> list[str]:
    """The addresses the options ask for; none of them leaves it to the configuration."""
    addresses: list[Address] = [unix_address(path) for path in sockets]
    if hosts or port is not None:
        number = DEFAULT_PORT if port is None else parse_port(port)
        addresses += [TcpAddress(host.strip("[]"), number) for host in hosts or [_DEFAULT_HOST]]
    return [str(address) for address in addresses]


def _admin_address(text: str) -> Address:
    """A path is that of a unix socket; ``HOST:PORT`` and ``unix:PATH`` are addresses."""
    return parse_address(text) if _ADDRESS.fullmatch(text) else unix_address(text)


def _export(text: str, name: str | None, options: dict[str, Any], shared: int | None) -> ExportPlan:
    named = _NAMED.fullmatch(text)
    if named is not None:
        text = named[2]
    parsed = _validated(ExportOptions, {"path": text} | options)
    image = parsed.image()
    if named is not None:
        own_name = named[1]
    elif image.nbd is not None:
        own_name = image.nbd.export
    else:
        own_name = os.path.basename(image.path)  # noqa: PTH119 - a trailing / gives ""
    return ExportPlan(
        own_name if name is None else name,
        image,
        parsed.description,
        parsed.allocation_depth,
        shared or 0,
        tuple(parsed.bitmaps),
    )


def _validated(model: Any, values: dict[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        detail = error.errors()[0]
        problem = detail["msg"].removeprefix("Value error, ")
        where = f"{_flag(str(detail['loc'][0]))}={detail['input']}: " if detail["loc"] else ""
        raise UsageError(f"{where}{problem}") from None


def _flag(option: str) -> str:
    """The command-line option of a model's option."""
    names = {
        "snapshot": "load-snapshot",
        "bitmaps": "bitmap",
        "overlay": "snapshot",
        "max_clients": "shared",
        "listen": "bind",
        "path": "IMAGE",
    }
    return f"--{names.get(option, option).replace('_', '-')}"
