"""``BlockdevOptions``: what ``blockdev-add`` takes, driver by driver, with QEMU's members."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Tag

from nbdserve.admin.schema import NULLABLE, Arguments, Size, Uint32, alternate, union

OnOffAuto: TypeAlias = Literal["auto", "on", "off"]


class CacheOptions(Arguments):
    """BlockdevCacheOptions."""

    direct: bool = False
    no_flush: bool = False


class NodeOptions(Arguments):
    """What every node has."""

    driver: str
    node_name: str | None = None
    discard: Literal["ignore", "unmap"] = "ignore"
    cache: CacheOptions | None = None
    read_only: bool = False
    auto_read_only: bool = False
    force_share: bool = False
    detect_zeroes: Literal["off", "on", "unmap"] = "off"


class FileOptions(NodeOptions):
    """A file, or a block device, as bytes. ``aio`` is accepted and changes nothing."""

    driver: Literal["file", "host_device"]
    filename: str
    locking: OnOffAuto = "auto"
    aio: Literal["threads", "native", "io_uring"] = "threads"


class NullOptions(NodeOptions):
    """A disk that keeps nothing. It always reads as zeroes."""

    driver: Literal["null-co"]
    size: Size = 1 << 30
    read_zeroes: bool = False


class InetAddress(Arguments):
    """InetSocketAddress."""

    host: str
    port: str


class UnixPath(Arguments):
    """UnixSocketAddress."""

    path: str


class InetServer(InetAddress):
    """An NBD server by TCP."""

    type: Literal["inet"]


class UnixServer(UnixPath):
    """An NBD server on a unix socket."""

    type: Literal["unix"]


NbdServer: TypeAlias = Annotated[
    Annotated[InetServer, Tag("=inet")] | Annotated[UnixServer, Tag("=unix")], union("type")
]


class NbdOptions(NodeOptions):
    """An export of another NBD server; delays are in seconds."""

    driver: Literal["nbd"]
    server: NbdServer
    export: str = ""
    reconnect_delay: Uint32 = 0
    open_timeout: Uint32 = 0


class BitmapName(Arguments):
    """A dirty bitmap of a node."""

    node: str
    name: str


class CopyBeforeWriteOptions(NodeOptions):
    """The disk of ``file``; before it changes, what was there is copied to ``target``.

    The whole disk is kept, whatever ``bitmap`` says, and what has changed since counts as dirty in bitmaps that are
    made or cleared after: a change between this and a backup is not lost.
    """

    driver: Literal["copy-before-write"]
    file: str
    target: str
    bitmap: BitmapName | None = None
    on_cbw_error: Literal["break-guest-write", "break-snapshot"] = "break-guest-write"
    cbw_timeout: Uint32 = 0


class SnapshotAccessOptions(NodeOptions):
    """The disk as it was when the ``copy-before-write`` node ``file`` was made."""

    driver: Literal["snapshot-access"]
    file: str


class ThrottleOptions(NodeOptions):
    """The disk of ``file``, whose clients the limits of a throttle group hold back."""

    driver: Literal["throttle"]
    throttle_group: str
    file: BlockdevRef


class RawOptions(NodeOptions):
    """The bytes of ``file``, or a window of them."""

    driver: Literal["raw"]
    file: BlockdevRef
    offset: Size | None = None
    size: Size | None = None


class EncryptOptions(Arguments):
    """How the content is encrypted."""

    format: Literal["aes", "luks"]
    key_secret: str | None = None


class ImageOptions(NodeOptions):
    """An image of any of the other formats."""

    driver: Literal[
        "bochs", "cloop", "dmg", "parallels", "qcow", "qcow2", "qed", "raw-cow", "vdi", "vhdx", "vmdk", "vpc"
    ]
    file: BlockdevRef
    backing: BlockdevRefOrNull = None
    encrypt: EncryptOptions | None = None
    data_file: BlockdevRef | None = None


class LuksOptions(NodeOptions):
    """A LUKS container."""

    driver: Literal["luks"]
    file: BlockdevRef
    key_secret: str | None = None


BlockdevOptions: TypeAlias = Annotated[
    Annotated[FileOptions, Tag("=file")]
    | Annotated[FileOptions, Tag("=host_device")]
    | Annotated[NullOptions, Tag("=null-co")]
    | Annotated[NbdOptions, Tag("=nbd")]
    | Annotated[CopyBeforeWriteOptions, Tag("=copy-before-write")]
    | Annotated[SnapshotAccessOptions, Tag("=snapshot-access")]
    | Annotated[ThrottleOptions, Tag("=throttle")]
    | Annotated[RawOptions, Tag("=raw")]
    | Annotated[LuksOptions, Tag("=luks")]
    | Annotated[ImageOptions, Tag("=bochs")]
    | Annotated[ImageOptions, Tag("=cloop")]
    | Annotated[ImageOptions, Tag("=dmg")]
    | Annotated[ImageOptions, Tag("=parallels")]
    | Annotated[ImageOptions, Tag("=qcow")]
    | Annotated[ImageOptions, Tag("=qcow2")]
    | Annotated[ImageOptions, Tag("=qed")]
    | Annotated[ImageOptions, Tag("=raw-cow")]
    | Annotated[ImageOptions, Tag("=vdi")]
    | Annotated[ImageOptions, Tag("=vhdx")]
    | Annotated[ImageOptions, Tag("=vmdk")]
    | Annotated[ImageOptions, Tag("=vpc")],
    union("driver"),
]
BlockdevRef: TypeAlias = Annotated[
    Annotated[str, Tag("=text")] | Annotated[BlockdevOptions, Tag("=object")], alternate("BlockdevRef")
]
BlockdevRefOrNull: TypeAlias = Annotated[
    Annotated[str, Tag("=text")] | Annotated[BlockdevOptions, Tag("=object")] | Annotated[None, Tag("=null")],
    alternate("BlockdevRefOrNull"),
    NULLABLE,
]

for _model in (ThrottleOptions, RawOptions, ImageOptions, LuksOptions):
    _model.model_rebuild()
