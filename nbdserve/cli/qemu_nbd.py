"""``nbdserve-qemu-nbd``: the server behind qemu-nbd's command line, for the tools that start one.

Options, defaults and life cycle are qemu-nbd's: one image, one client at a time unless ``-e``, the end when the last
client has left unless ``-t``, exit code 1 for every error. What is not available yet is refused by name.
"""

from __future__ import annotations

import getopt
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from nbdserve import __version__
from nbdserve.app import ExportPlan, Plan, run
from nbdserve.block.spec import CACHE_MODES, DETECT_ZEROES_MODES, ImageSpec
from nbdserve.cli import nbd_client
from nbdserve.cli.boundary import guarded
from nbdserve.cli.daemon import fork_until_ready
from nbdserve.config.image_opts import discard_mode, image_from_filename, image_from_opts, snapshot_name
from nbdserve.config.secrets import secrets_of_objects
from nbdserve.errors import ConfigError
from nbdserve.protocol.client import RemoteExport
from nbdserve.protocol.constants import (
    EXPORT_BLOCK_STATUS_PAYLOAD,
    EXPORT_CAN_MULTI_CONN,
    EXPORT_READ_ONLY,
    EXPORT_ROTATIONAL,
    EXPORT_SEND_CACHE,
    EXPORT_SEND_DF,
    EXPORT_SEND_FAST_ZERO,
    EXPORT_SEND_FLUSH,
    EXPORT_SEND_FUA,
    EXPORT_SEND_RESIZE,
    EXPORT_SEND_TRIM,
    EXPORT_SEND_WRITE_ZEROES,
)
from nbdserve.server.addresses import DEFAULT_PORT, Address, TcpAddress, parse_port, unix_address
from nbdserve.server.listeners import Listener, inherited
from nbdserve.server.server import ServerLimits
from nbdserve.units import parse_size

PROGRAM: Final = "nbdserve-qemu-nbd"

_LONG_OF_SHORT: Final = {
    "h": "help", "V": "version", "p": "port", "b": "bind", "k": "socket", "e": "shared", "t": "persistent",
    "v": "verbose", "x": "export-name", "D": "description", "o": "offset", "A": "allocation-depth", "B": "bitmap",
    "L": "list", "T": "trace", "c": "connect", "d": "disconnect", "f": "format", "r": "read-only", "s": "snapshot",
    "l": "load-snapshot", "n": "nocache",
}  # fmt: skip
_SHORT_OPTIONS: Final = "hVp:b:k:e:tvx:D:o:AB:LT:c:df:rsl:n"
_LONG_OPTIONS: Final = (
    "help", "version", "port=", "bind=", "socket=", "shared=", "persistent", "verbose", "export-name=",
    "description=", "offset=", "allocation-depth", "bitmap=", "list", "trace=", "connect=", "disconnect", "format=",
    "read-only", "snapshot", "load-snapshot=", "nocache", "cache=", "aio=", "discard=", "detect-zeroes=",
    "image-opts", "fork", "pid-file=", "object=", "tls-creds=", "tls-authz=", "tls-hostname=", "selinux-label=",
)  # fmt: skip

AIO_MODES: Final = ("threads", "native", "io_uring")
"""Accepted, since every client names one; file I/O is done in one way here, and the choice changes no result."""

_NOT_SUPPORTED: Final = {
    "trace": "tracing is not supported yet",
    "connect": "attaching /dev/nbdX is not supported; use nbd-client with the server's socket",
    "disconnect": "detaching /dev/nbdX is not supported; use nbd-client -d",
    "tls-creds": "TLS is not supported yet",
    "tls-authz": "TLS is not supported yet",
    "tls-hostname": "TLS is not supported yet",
    "selinux-label": "SELinux labels are not supported yet",
}

HELP: Final = f"""\
Usage: {PROGRAM} [OPTIONS] FILE
  or:  {PROGRAM} -L [OPTIONS]
Serve a disk image over NBD, with the command line of qemu-nbd.

  -h, --help                print this and exit
  -V, --version             print the version and exit

Connections:
  -p, --port=PORT           TCP port (default 10809)
  -b, --bind=ADDRESS        address to listen on (default 0.0.0.0)
  -k, --socket=PATH         listen on a unix socket instead
  -e, --shared=NUM          clients at a time; 0 is any number (default 1)
  -t, --persistent          go on when the last client has left
  -x, --export-name=NAME    name of the export (default empty)
  -D, --description=TEXT    text for people about the export
  -L, --list                list the exports of another server
  -v, --verbose             print the URI clients connect to

The image:
  -f, --format=FORMAT       raw, qcow2, vmdk, vpc, ...; without it the file is probed
      --image-opts          FILE is driver=...,file.filename=...
  -o, --offset=OFFSET       where the disk begins in the image
  -r, --read-only           refuse writes
  -s, --snapshot            drop all writes at exit
  -l, --load-snapshot=SNAP  serve an internal snapshot: ID, NAME, snapshot.id=ID or snapshot.name=NAME
  -A, --allocation-depth    offer qemu:allocation-depth
  -B, --bitmap=NAME         offer qemu:dirty-bitmap:NAME, which the image or a backing file holds; may be repeated
  -n, --nocache             the same as --cache=none
      --cache=MODE          none, writeback (default), writethrough, directsync or unsafe
      --aio=MODE            threads, native or io_uring
      --discard=MODE        ignore (off, default) or unmap (on)
      --detect-zeroes=MODE  off (default), on or unmap
      --object secret,id=ID,file=PATH
                            a passphrase, which the image names: --image-opts ...,encrypt.key-secret=ID

The process:
      --fork                return when clients can connect
      --pid-file=PATH       write the process id to this file
"""


class UsageError(ConfigError):
    """The command line is not one qemu-nbd would take."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}\nTry '{PROGRAM} --help' for more information.")


@dataclass(slots=True)
class Arguments:
    """The command line. Each option's value is its last one, as with getopt."""

    options: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    """Every ``--object``."""
    bitmaps: list[str] = field(default_factory=list)
    """Every ``--bitmap``."""

    def __contains__(self, option: str) -> bool:
        return option in self.options

    def get(self, option: str, default: str = "") -> str:
        return self.options.get(option, default)


def main() -> None:
    """The entry point."""
    sys.exit(guarded(PROGRAM, lambda: run_command_line(sys.argv[1:])))


def run_command_line(argv: list[str]) -> int:
    """Do what the command line says; the exit code."""
    arguments = parse_arguments(argv)
    if "help" in arguments:
        print(HELP, end="")
        return 0
    if "version" in arguments:
        print(f"{PROGRAM} {__version__}")
        return 0
    for option, problem in _NOT_SUPPORTED.items():
        if option in arguments:
            raise ConfigError(f"--{option}: {problem}")
    if "list" in arguments:
        return _list_exports(arguments)
    listeners = inherited(os.environ)
    plan = plan_of(arguments, listeners)
    ready = fork_until_ready() if "fork" in arguments else lambda: None
    return run(plan, _announcer(arguments, ready))


def parse_arguments(argv: list[str]) -> Arguments:
    """Options in any order, combined short ones, ``--name=value`` and unambiguous beginnings of names."""
    try:
        found, files = getopt.gnu_getopt(argv, _SHORT_OPTIONS, list(_LONG_OPTIONS))
    except getopt.GetoptError as error:
        raise UsageError(error.msg) from None
    arguments = Arguments(files=files)
    for option, value in found:
        name = option.removeprefix("--") if option.startswith("--") else _LONG_OF_SHORT[option[1:]]
        if name in {"cache", "nocache"} and ("cache" in arguments or "nocache" in arguments):
            raise UsageError("-n and --cache can be given only once")
        if name == "object":
            arguments.objects.append(value)
        elif name == "bitmap":
            arguments.bitmaps.append(value)
        arguments.options[name] = value
    return arguments


def plan_of(arguments: Arguments, listeners: list[Listener]) -> Plan:
    """What to serve; ``listeners`` are those of socket activation. ConfigError names the option at fault."""
    if len(arguments.files) != 1:
        raise UsageError(f"give one image, not {len(arguments.files)}")
    if listeners:
        for option in ("socket", "bind", "port"):
            if option in arguments:
                raise ConfigError(f"--{option}: the socket is inherited (LISTEN_FDS), leave this out")
    shared = _number(arguments, "shared", 1)
    export = ExportPlan(
        arguments.get("export-name"),
        _image(arguments),
        arguments.get("description"),
        allocation_depth="allocation-depth" in arguments,
        max_connections=shared,
        bitmaps=tuple(arguments.bitmaps[::-1]),  # the order in which qemu-nbd numbers them
    )
    return Plan(
        [export],
        [_address(arguments)],
        listeners,
        ServerLimits(max_clients=shared),
        default_export=None,
        exit_last="persistent" not in arguments,
        pid_file=arguments.get("pid-file"),
    )


def _address(arguments: Arguments) -> Address:
    if "socket" in arguments:
        return unix_address(arguments.get("socket"))
    port = parse_port(arguments.get("port")) if "port" in arguments else DEFAULT_PORT
    return TcpAddress(arguments.get("bind") or "0.0.0.0", port)


def _image(arguments: Arguments) -> ImageSpec:
    file = arguments.files[0]
    flags = ImageSpec(
        path=file,
        format=arguments.options.get("format"),
        read_only="read-only" in arguments,
        offset=_size(arguments, "offset"),
        cache=_choice(arguments, "cache", "none" if "nocache" in arguments else "writeback", CACHE_MODES),
        discard=discard_mode(arguments.get("discard", "ignore")),
        detect_zeroes=_choice(arguments, "detect-zeroes", "off", DETECT_ZEROES_MODES),
    )
    _choice(arguments, "aio", "threads", AIO_MODES)
    secrets = secrets_of_objects(arguments.objects)
    if "image-opts" in arguments:
        if flags.format is not None:
            raise ConfigError("--image-opts and -f exclude each other; give driver=... instead of -f")
        image = image_from_opts(file, flags, secrets)
    else:
        image = image_from_filename(file, flags, secrets)
    if image.detect_zeroes == "unmap" and image.discard != "unmap":
        raise ConfigError("--detect-zeroes=unmap needs --discard=unmap")
    wanted = arguments.options.get("load-snapshot")
    return replace(image, snapshot=None if wanted is None else snapshot_name(wanted), overlay="snapshot" in arguments)


def _choice(arguments: Arguments, option: str, default: str, choices: tuple[str, ...]) -> str:
    chosen = arguments.get(option, default)
    if chosen not in choices:
        raise ConfigError(f"--{option}={chosen}: give one of {', '.join(choices)}")
    return chosen


def _number(arguments: Arguments, option: str, default: int) -> int:
    text = arguments.get(option, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"--{option}={text}: give a number, 0 or more, below 10^9")
    return int(text)


def _size(arguments: Arguments, option: str) -> int:
    try:
        return parse_size(arguments.get(option, "0"))
    except ValueError as error:
        raise ConfigError(f"--{option}: {error}") from None


def _announcer(arguments: Arguments, forked: Callable[[], None]) -> Callable[[list[Address]], None]:
    def ready(addresses: list[Address]) -> None:
        if "verbose" in arguments:
            for address in addresses:
                print(f"{PROGRAM}: {address.uri(arguments.get('export-name'))}", file=sys.stderr)
        forked()

    return ready


# --- qemu-nbd -L -------------------------------------------------------------------------------------------------

_FLAG_NAMES: Final = (
    (EXPORT_READ_ONLY, "readonly"),
    (EXPORT_SEND_FLUSH, "flush"),
    (EXPORT_SEND_FUA, "fua"),
    (EXPORT_ROTATIONAL, "rotational"),
    (EXPORT_SEND_TRIM, "trim"),
    (EXPORT_SEND_WRITE_ZEROES, "zeroes"),
    (EXPORT_SEND_DF, "df"),
    (EXPORT_CAN_MULTI_CONN, "multi"),
    (EXPORT_SEND_RESIZE, "resize"),
    (EXPORT_SEND_CACHE, "cache"),
    (EXPORT_SEND_FAST_ZERO, "fast-zero"),
    (EXPORT_BLOCK_STATUS_PAYLOAD, "block-status-payload"),
)


def _list_exports(arguments: Arguments) -> int:
    if arguments.files:
        raise UsageError("--list takes no image")
    secrets_of_objects(arguments.objects)  # refuses those for TLS
    for option in ("export-name", "offset", "format", "read-only", "snapshot", "load-snapshot", "persistent", "fork"):
        if option in arguments:
            raise UsageError(f"--list and --{option} exclude each other")
    address = _address(arguments)
    if isinstance(address, TcpAddress) and "bind" not in arguments:
        address = TcpAddress("localhost", address.port)
    exports = nbd_client.list_exports(address)
    print(f"exports available: {len(exports)}")
    for name, description in exports:
        _print_export(name, description, nbd_client.describe(address, name))
    return 0


def _print_export(name: str, description: str, export: RemoteExport) -> None:
    """The lines of qemu-nbd -L, for the scripts that read them."""
    flags = " ".join(word for bit, word in _FLAG_NAMES if export.flags & bit)
    print(f" export: '{name}'")
    if description or export.description:
        print(f"  description: {description or export.description}")
    print(f"  size:  {export.size}")
    print(f"  flags: {export.flags:#x} ( {flags} )")
    print(f"  min block: {export.minimum_block}")
    print(f"  opt block: {export.preferred_block}")
    print(f"  max block: {export.maximum_block}")
    print(f"  available meta contexts: {len(export.contexts)}")
    for _, context in export.contexts:
        print(f"   {context}")


if __name__ == "__main__":
    main()
