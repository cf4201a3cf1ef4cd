"""Every option of the server: its name, type, default and help, declared once.

The configuration file is these models in TOML, ``config/nbdserve.toml`` is printed from them, and the command line
takes its defaults and help from them. Paths are relative to the working directory; in a file, to the file's directory.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from nbdserve.block.spec import ImageSpec
from nbdserve.config.image_opts import discard_mode, image_from_filename
from nbdserve.config.secrets import chosen_secret
from nbdserve.errors import ConfigError
from nbdserve.formats.encryption import UNLOCK_SECONDS
from nbdserve.server.addresses import Address, parse_address
from nbdserve.storage.nbd_target import is_nbd
from nbdserve.units import MIB, parse_size


def _absolute(text: str, info: ValidationInfo) -> str:
    return os.path.join(info.context["directory"], text) if info.context and text else text  # noqa: PTH118


def _image_path(text: str, info: ValidationInfo) -> str:
    return text if text.startswith("json:") or is_nbd(text) else _absolute(text, info)


def _address(text: str, info: ValidationInfo) -> str:
    path = text.removeprefix("unix:")
    if path != text and not path.startswith("@"):
        text = f"unix:{_absolute(path, info)}"
    _raising_value_error(parse_address, text)
    return text


def _size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


def _raising_value_error(parse: Any, value: str) -> Any:
    """pydantic collects ValueErrors and names the field; ConfigErrors would pass it by."""
    try:
        return parse(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


FilePath = Annotated[str, AfterValidator(_absolute)]
ImagePath = Annotated[str, Field(min_length=1), AfterValidator(_image_path)]
ListenAddress = Annotated[str, AfterValidator(_address)]
Size = Annotated[int, BeforeValidator(_size), Field(ge=0, lt=1 << 63)]
DiscardMode = Annotated[
    Literal["ignore", "unmap"], BeforeValidator(lambda text: _raising_value_error(discard_mode, str(text)))
]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ServerOptions(_Options):
    """What concerns the server as a whole."""

    listen: list[ListenAddress] = Field(
        default=["127.0.0.1:10809"],
        description='Addresses to listen on: "127.0.0.1:10809", "[::1]:10809", "*:10809" (every address), '
        '"unix:/path", "unix:@abstract".',
    )
    default_export: str = Field(
        default="", description="The export a client gets that asks for none by name. Empty: the first one."
    )
    image_roots: list[FilePath] = Field(
        default=[],
        description="Directories below which backing and data files named in image headers are opened, besides the "
        "directory of the image itself.",
    )
    exit_last: bool = Field(
        default=False,
        description="Exit when the last client that used an export has left, as qemu-nbd does without -t.",
    )
    max_clients: int = Field(
        default=0, ge=0, description="Clients connected at a time, further ones wait until one leaves; 0 is any number."
    )
    max_handshakes: int = Field(
        default=100, ge=1, description="Clients in negotiation at a time; the oldest makes room for a new one."
    )
    request_memory: Size = Field(
        default=256 * MIB,
        ge=128 * MIB,
        description="Memory that the requests and replies of all clients may take together; further large ones wait, "
        "and clients that hold some of it and do not move are dropped then.",
    )
    handshake_seconds: float = Field(
        default=10.0, gt=0, description="Time a client has to choose an export before it is dropped."
    )
    drain_seconds: float = Field(
        default=10.0,
        ge=0,
        description="On SIGTERM, time for requests in flight to finish before connections are closed.",
    )
    pid_file: FilePath = Field(default="", description="File to write the process id to once clients can connect.")

    def addresses(self) -> list[Address]:
        """``listen``, parsed."""
        return [parse_address(text) for text in self.listen]


class ExportOptions(_Options):
    """One export, ``[exports.NAME]``: an image and how it is served."""

    path: ImagePath = Field(
        description="The image file, an nbd:// or nbd+unix:// URI, or QEMU's json:{...} description. Required.",
        examples=["disk.qcow2"],
    )
    format: str | None = Field(
        default=None,
        description='Its format: "raw", "qcow2", "vmdk" ... Say it: without it the file is probed, and then writes '
        "that would make a raw image look like another format are refused.",
        examples=["qcow2"],
    )
    description: str = Field(default="", description="A text for people, shown by nbdinfo.")
    read_only: bool = Field(default=False, description="Refuse writes.")
    max_connections: int = Field(default=0, ge=0, description="Clients at a time; 0 is any number.")
    allocation_depth: bool = Field(
        default=False, description="Offer qemu:allocation-depth: which layer of the chain each range comes from."
    )
    bitmaps: list[str] = Field(
        default=[],
        description="Names of dirty bitmaps stored in the image or its backing files, offered as "
        "qemu:dirty-bitmap:NAME. The image must be served read_only if it has them itself.",
    )
    snapshot: str | None = Field(
        default=None, description="Serve this internal snapshot (id or name), read-only.", examples=["before-upgrade"]
    )
    overlay: bool = Field(default=False, description="Take writes in a temporary overlay that is dropped at exit.")
    offset: Size = Field(default=0, description='Where the disk begins in the image, in bytes or as "1M".')
    size: Size | None = Field(
        default=None, description="Length of the disk, else to the end of the image.", examples=["10G"]
    )
    backing: Literal["header", "none"] = Field(
        default="header",
        description='"header" follows the backing file the image names, "none" serves the layer alone.',
    )
    cache: Literal["none", "writeback", "unsafe", "directsync", "writethrough"] = Field(
        default="writeback",
        description='"writeback"; "none" bypasses the page cache; "writethrough" and "directsync" make every write '
        'stable before its reply; "unsafe" ignores flushes.',
    )
    discard: DiscardMode = Field(
        default="ignore", description='"unmap" gives trimmed and zeroed space back, "ignore" keeps it.'
    )
    detect_zeroes: Literal["off", "on", "unmap"] = Field(
        default="off",
        description='Turn writes of zeroes into zero clusters ("on"), or also give the space back ("unmap").',
    )
    secret_file: FilePath = Field(
        default="",
        description="File with the passphrase of an encrypted image, also of those its header names as backing files. "
        "All its bytes count, a newline at the end as well.",
    )
    secret_env: str = Field(default="", description="Environment variable with that passphrase instead.")
    unlock_seconds: float = Field(
        default=UNLOCK_SECONDS,
        gt=0,
        description="Processor time that trying the passphrase may take. A LUKS header says how much work that is; one "
        "that asks for more is refused at once. Lower it for images of strangers.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ExportOptions:
        if self.detect_zeroes == "unmap" and self.discard != "unmap":
            raise ValueError('detect_zeroes = "unmap" needs discard = "unmap"')
        if self.secret_file and self.secret_env:
            raise ValueError("secret_file and secret_env exclude each other")
        return self

    def image(self) -> ImageSpec:
        """What to open. ConfigError when ``path`` is a ``json:`` description with a mistake in it."""
        flags = ImageSpec(
            path=self.path,
            format=self.format,
            read_only=self.read_only,
            snapshot=self.snapshot,
            offset=self.offset,
            size=self.size,
            cache=self.cache,
            discard=self.discard,
            detect_zeroes=self.detect_zeroes,
            backing=None if self.backing == "none" else "header",
            overlay=self.overlay,
            secret=chosen_secret(self.secret_file, self.secret_env),
            unlock_seconds=self.unlock_seconds,
        )
        return image_from_filename(self.path, flags)


class AdminOptions(_Options):
    """The admin socket."""

    listen: list[ListenAddress] = Field(
        default=[],
        description="Addresses where QMP clients (nbdserve admin, qmp-shell) drive the server. Whoever connects may do "
        "everything: a unix socket is for its owner only (mode 0600), and TCP must be 127.0.0.1 or [::1]. Empty: none.",
        examples=[["unix:/run/nbdserve/admin.sock"]],
    )

    roots: list[FilePath] = Field(
        default=[],
        description="Directories below which clients may name files with secrets, and sockets to serve NBD on, besides "
        "the image roots and the directories of the server's own unix sockets. Image headers name nothing there.",
    )

    def addresses(self) -> list[Address]:
        """``listen``, parsed."""
        return [parse_address(text) for text in self.listen]


class Config(_Options):
    """A whole configuration file."""

    server: ServerOptions = Field(default=ServerOptions())
    admin: AdminOptions = Field(default=AdminOptions())
    exports: dict[str, ExportOptions] = Field(default={})


def default_of(model: type[BaseModel], option: str) -> Any:
    """The default of an option."""
    return model.model_fields[option].default


def help_of(model: type[BaseModel], option: str) -> str:
    """The help of an option."""
    return model.model_fields[option].description or ""
