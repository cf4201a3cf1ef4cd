"""What the user asks to open: one value whatever it was written in (command line, ``json:``, configuration)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from nbdserve.formats.encryption import UNLOCK_SECONDS
from nbdserve.storage.base import Storage
from nbdserve.storage.nbd_target import NbdTarget

if TYPE_CHECKING:
    from nbdserve.block.node import Node

CACHE_MODES: Final = ("none", "writeback", "unsafe", "directsync", "writethrough")
DISCARD_MODES: Final = ("ignore", "unmap")
DETECT_ZEROES_MODES: Final = ("off", "on", "unmap")


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """An image and how to open it; the fields have the names and meanings of qemu-nbd's options."""

    path: str
    format: str | None = None
    """None: the user gave none, and the file is probed. A format a header should declare is never probed."""
    read_only: bool = False
    snapshot: str | None = None
    """Serve this internal snapshot (id or name), read-only."""
    offset: int = 0
    """Where the disk begins in the image, bytes."""
    size: int | None = None
    """The length of the disk, bytes; None: up to the end of the image."""
    cache: str = "writeback"
    discard: str = "ignore"
    detect_zeroes: str = "off"
    backing: BackingSpec = "header"
    """``"header"``: the file the image's header names; None: none, whatever the header says; a spec: this one, or, if
    it has no path, the file the header names, opened as the spec says."""
    file: ImageSpec | None = None
    """The image whose disk holds this one's bytes, instead of the file at ``path``, which then only names it."""
    nbd: NbdTarget | None = None
    """The NBD export that holds the bytes; ``path`` is then its URI. Said by the user, never by a header."""
    opened: Storage | None = field(default=None, repr=False, compare=False)
    """What holds its bytes, open already; whoever opens the image owns it from then on."""
    file_node: Node | None = field(default=None, repr=False, compare=False)
    """The node of the file: the image is under its locks and takes none of its own, also when it is opened again."""
    gets_backing: bool = False
    """A layer is to be put below it: what reads as zeroes now and is written as such has to hide that layer."""
    data_file: ImageSpec | None = None
    """The external data file, instead of the one the image's header names."""
    secret: bytes | None = field(default=None, repr=False)
    """The passphrase of an encrypted image, and of the layers below that headers name."""
    unlock_seconds: float = UNLOCK_SECONDS
    """Processor time that each of those may take to open with it."""
    keep_bitmaps: bool = False
    """Its stored bitmaps stay valid when it is opened for writing: its disk, but for its size, is not changed."""
    force_share: bool = False
    """Open although another process may be writing it (qemu-img ``-U``); the view is then not consistent."""
    overlay: bool = False
    """Writes go to a temporary overlay that is dropped at the end (qemu-nbd ``--snapshot``)."""

    @property
    def writethrough(self) -> bool:
        """Every write is stable before its reply."""
        return self.cache in {"directsync", "writethrough"}


BackingSpec: TypeAlias = "ImageSpec | Literal['header'] | None"
