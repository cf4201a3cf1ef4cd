"""What describes an image for the suites, and what describes a format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

ByteOrder: TypeAlias = Literal["little", "big"]


@dataclass(frozen=True)
class Geometry:
    """One shape of an image. Sizes in bytes. The name is unique over all formats."""

    name: str
    size: int
    """What is asked for; a format that rounds makes a larger disk of it (``Image.size``)."""
    fmt: str
    options: str = ""
    """As after qemu-img's ``-o``."""
    base: str = ""
    """The format of the backing file; empty: none."""
    base_size: int = 0
    base_options: str = ""
    backing_by_user: bool = False
    """The image does not name its backing file; whoever opens it says which it is."""
    own: bool = False
    """The image has content of its own from the start."""
    compressed: bool = False
    """That content, and the backing file's, is compressed where it can be."""
    snapshot: bool = False
    """The first content is also held by an internal snapshot."""
    maker: Literal["stock", "ours"] = "stock"
    """Whose ``image create`` makes it."""
    fill: Literal["convert", "stock", "ours"] = "convert"
    """How content of its own gets in: ``qemu-img convert``, qemu-io's writes, or those of our node. An image with a
    backing file is never converted."""
    make_from: Callable[[Path, Path], None] | None = None
    """Makes the image (second path) from a raw file (first path), for formats that nobody here creates."""
    stock: Literal["rw", "r", ""] = "rw"
    """What QEMU's tools can do with it."""
    stock_zeroes: bool = True
    """QEMU's tools zero parts of it without damage."""
    reader: Callable[[Path], bytes] | None = None
    """The content of the image by an independent reader, where QEMU's tools are none."""
    noise: bool = False
    """What was never written reads as anything: it is deciphered like the rest."""
    encryption: Literal["", "luks", "aes"] = ""
    secret: bytes = b""
    """Its passphrase (printable)."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Field:
    """A number in a file of the image, for the boundary sweep."""

    name: str
    offset: int
    """From the start of the file, or negative: from its end."""
    size: int
    """1, 2, 4 or 8 bytes."""
    order: ByteOrder = "little"
    file: int = 0
    """Which file of the image: 0 the image itself, then its companions."""


Contents: TypeAlias = Sequence[bytearray]
"""The files of an image: itself, then its companions."""


@dataclass(frozen=True)
class Kit:
    """A format, as the suites know it."""

    fmt: str
    geometries: tuple[Geometry, ...] = ()
    """Shapes that can be written; small, for the crash states hold copies of them."""
    more: tuple[Geometry, ...] = ()
    """Further ones, for the differential rounds alone."""
    readable: tuple[Geometry, ...] = ()
    """Shapes that can only be read."""
    create: tuple[str, ...] = ("",)
    """Creation options to try, each as after ``-o``. A raw file ``base`` of 1 MiB is there to be named."""
    stock_check: bool = False
    """``qemu-img check`` knows the format."""
    crash_codes: tuple[int, ...] = (0, 3)
    """Its exit codes that are right after a crash."""
    crash_repair: bool = False
    """After a crash ``qemu-img check -r all`` comes first: the format has a mark or a log for that (QED need_check,
    Parallels in_use, VHDX log), and QEMU's tools do not read the image before."""
    crash_used: int = 0
    """After the judgement of a crash, QEMU writes a sector into each unit of so many bytes, and the image is judged
    once more: what it takes for granted when it allocates is still so."""
    crash_marks: int = 0
    """Errors our own check counts after a crash because of that mark."""
    fields: tuple[Field, ...] = ()
    """Every number of the header, and of other structures that are always there."""
    seal: Callable[[Contents], None] | None = None
    """Makes checksums right again, so that what is changed below them is looked at."""

    @property
    def all(self) -> tuple[Geometry, ...]:
        """Every geometry of the format."""
        return self.geometries + self.more + self.readable
