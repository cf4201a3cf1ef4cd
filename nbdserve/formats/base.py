"""The contract of a format driver: *what is at this guest offset, in your own layer?*

A driver never loops over a request, never pads, never sees a backing file and never sees NBD; one shared engine
(``nbdserve.block``) does that for every format. A driver defines what its format can do: ``open``, ``info`` and
``lookup`` are required, and overriding one of the optional methods is what makes the capability true
(``FormatDriver.can``).

**Synchronous questions.** ``lookup``, ``lookup_writable``, ``allocate``, ``zero`` and ``discard`` are synchronous and
work on tables in memory. ``None`` means a table they need is not there: ``await load(offset)`` (``prepare`` for
``allocate``), then ask again.

**Locks are the engine's.** ``allocate`` .. ``publish``, ``zero`` and ``discard`` are called with the range, widened to
whole clusters, held exclusively: nothing else reads or writes these clusters through the engine meanwhile.

**Order on disk.** The map in memory changes at once; the disk follows at ``flush``, in an order every crash survives:
nothing on disk ever points at data or tables that are not stable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.errors import ConfigError
from nbdserve.extents import Run, RunStream
from nbdserve.storage.base import ReadBuffer, Storage


@dataclass(frozen=True, slots=True)
class BackingReference:
    """The backing file as the image's header names it. Nothing is opened by a driver."""

    name: str
    format: str | None
    """The declared format; None where the header has none (the engine then refuses: a format is never guessed)."""


@dataclass(frozen=True, slots=True)
class Companion:
    """Another file that belongs to the image: an external data file, an extent. Nothing is opened by a driver."""

    name: str
    """As the header has it: relative names begin at the directory of the image."""
    field: str
    """What errors call it."""
    read_only: bool = False
    """Never written, also when the image is."""
    guest_data_only: bool = False
    """It holds nothing but guest bytes, so what looks at metadata alone leaves it closed; the driver is given the
    image's own storage in its place."""


@dataclass(slots=True)
class Allocation:
    """Host space for the guest range ``[offset, offset + length)``, not yet visible to anyone."""

    offset: int
    length: int
    host_offset: int
    zeroed: bool
    """The host range is known to read as zeroes, so parts that should be zero need no write."""
    token: Any = None
    """The driver's own."""


@dataclass(frozen=True, slots=True)
class CreateOption:
    """One ``-o name=value`` of ``image create``, with qemu-img's name and meaning."""

    name: str
    help: str
    default: str = ""


@dataclass(slots=True)
class ImageInfo:
    """What ``image info`` prints of one layer; ``specific`` has the keys of qemu-img's ``format-specific.data``."""

    format: str
    virtual_size: int
    cluster_size: int | None = None
    backing: BackingReference | None = None
    dirty: bool | None = False
    """Whoever changed the image last did not close it. None: nothing to be said, and qemu-img has no such line."""
    encrypted: bool = False
    specific: dict[str, Any] = field(default_factory=dict)
    snapshots: list[SnapshotInfo] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """An internal snapshot, with the fields of qemu-img's JSON."""

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    disk_size: int
    icount: int | None = None


@dataclass(frozen=True, slots=True)
class BitmapInfo:
    """A dirty bitmap stored in an image."""

    name: str
    granularity: int
    """Bytes."""
    in_use: bool
    """It was open for recording and not stored since: what it holds means nothing."""
    auto: bool
    """It records whenever the image is written."""


@dataclass(slots=True)
class CheckResult:
    """What ``image check`` found; the fields are qemu-img's."""

    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    messages: list[str] = field(default_factory=list)


class RoomNeededError(Exception):
    """``prepare``: nothing is allocated before ``make_room`` has been awaited; no request may be under way then."""


class FormatDriver(ABC):
    """One open image layer."""

    name: ClassVar[str]
    """QEMU's format name."""
    create_options: ClassVar[tuple[CreateOption, ...]] = ()
    amend_options: ClassVar[tuple[CreateOption, ...]] = ()
    """What ``amend`` takes."""
    key_options: ClassVar[tuple[CreateOption, ...]] = ()
    """What ``amend_keys`` takes."""
    has_snapshots: ClassVar[bool] = False
    """``open`` takes ``snapshot``, the id or name of an internal snapshot, and is then read-only."""
    backing_formats: ClassVar[tuple[str, ...] | None] = ()
    """What an image of this format may have below it: these formats, or any (None)."""
    repairs: ClassVar[bool] = True
    """``check`` mends what it is told to."""
    declares_backing_format: ClassVar[bool] = True
    """The header has a word for every format of a backing file; else the user gives it at each use."""
    takes_data_file: ClassVar[bool] = False
    """The one companion such an image may have can be chosen by the user (``data-file``)."""
    preallocation_modes: ClassVar[tuple[str, ...]] = ()
    """What ``preallocate`` takes."""
    keeps_companions: ClassVar[bool] = False
    """``create`` leaves what its companions hold: those that are there have the size of the disk."""

    zeroes_with_rest: ClassVar[bool] = False
    """A part of a unit is zeroed in the mapping, with the rest of the unit, where that reads as zeroes already."""
    needs_open_backing: ClassVar[bool] = False
    """An image holds the identity of its backing file, so it can be made only while that is open."""

    path: str
    read_only: bool
    size: int
    """Virtual size in bytes."""
    cluster_size: int
    """The unit of allocation: the engine serialises changes of the mapping at this size. A power of two."""
    granularity: int
    """The unit of the mapping: ``allocate``, ``zero`` and ``discard`` act on multiples of it (less at the end of the
    disk). Equal to ``cluster_size``, or smaller with subclusters."""
    storage: Storage
    """Where the metadata is."""
    data: Storage
    """What ``host_offset`` of DATA runs counts in; ``storage`` itself, or an external data file."""
    backing: BackingReference | None = None
    origin: object = None
    """How the block layer opened the image, for it to open it again."""
    keeps_places: bool = False
    """A host range of a DATA run never comes to hold other guest bytes while the image is open.

    True of raw, and of whatever is open read-only."""
    stands_alone: bool = False
    """Nothing of the backing file shows, and nothing ever will, so that the image is of use without it."""
    flags_zeroes: bool = False
    """Zeroes over a backing file are to be flagged in the mapping although another program may then get them wrong."""
    compressed_only: bool = False
    """It is written with ``write_compressed`` and no other way."""
    abandons_freely: ClassVar[bool] = False
    """An abandoned allocation leaves nothing behind but space in the file, for the next ones."""
    zeroes_fast: bool = False
    """Zeroing this image is a change of metadata, or is left to its storage; no zeroes are written."""

    @classmethod
    @abstractmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the image on ``storage``; the driver owns it from here on (a failed open leaves it to the caller).

        Every driver may find these options: ``discard`` (``"unmap"``: give freed space back to the file system, or
        ``"ignore"``); ``has_backing``, whether the user put a layer below this one, whatever the header says;
        ``companions``, the open storages of ``companions()`` in the same order, owned like ``storage``; ``secret``,
        the passphrase of an encrypted image, bytes or None; ``metadata_only``: no guest byte will be read or written,
        so that an encrypted image needs no secret. Others belong to one format: ``snapshot`` (``has_snapshots``),
        raw's ``offset`` and ``size``.

        Raises ImageError naming file, field and value; nothing is modified by a failed or a read-only open.
        """

    @classmethod
    async def companions(cls, storage: Storage) -> Sequence[Companion]:
        """The other files the header on ``storage`` names, to be opened before it. ImageError as for ``open``."""
        return ()

    def accept_backing(self, backing: FormatDriver) -> None:
        """Called once, with the layer below as it was opened.

        ImageError, naming field and value, when it is not the parent this image was made on.
        """

    def see_backing(self, changed_at: float | None, problem: str) -> None:
        """Before a ``check``: when the backing file was last changed, seconds since 1970, or why it cannot be opened.

        Called where the driver defines it, and there is a backing file.
        """

    # --- making one ----------------------------------------------------------------------------------------------

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """ConfigError for every bad option, and for a size the format cannot have; nothing is touched.

        Options are strings as after ``-o``, without ``size``.
        """
        if not cls.can("create"):
            raise ConfigError(f"Format driver '{cls.name}' does not support image creation")
        cls.check_option_names(options)

    @classmethod
    def encrypts(cls, options: Mapping[str, str]) -> bool:
        """Whether an image made with these options is encrypted, so that ``create`` needs a secret."""
        return False

    @classmethod
    def check_option_names(cls, options: Mapping[str, str]) -> None:
        """ConfigError for the first option that is none of ``create_options``."""
        known = {option.name for option in cls.create_options}
        for name in options:
            if name not in known:
                if name in ("backing_file", "backing_fmt"):
                    raise ConfigError(f"{cls.name} images have no backing file")
                raise ConfigError(f"unknown {cls.name} option {name!r}: `-o help` lists the options there are")

    @classmethod
    def created_size(cls, size: int, options: Mapping[str, str]) -> int:
        """The virtual size an image made with ``size`` has: formats that count in larger units round it."""
        return size

    @classmethod
    def created_companions(cls, path: str, size: int, options: Mapping[str, str]) -> Sequence[str]:
        """The other files that making the image ``path`` makes, as names relative to it; for checked options."""
        return ()

    @classmethod
    async def create(
        cls,
        storage: Storage,
        size: int,
        options: Mapping[str, str],
        *,
        companions: Sequence[Storage] = (),
        backing: FormatDriver | None = None,
        secret: bytes | None = None,
    ) -> None:
        """Make ``storage`` an image of ``size`` bytes; what the files held before is lost. Stable on return.

        ``companions`` are the storages of ``created_companions``, ``backing`` the open backing file if the caller has
        it, ``secret`` the passphrase of an encrypted image. ConfigError, before anything is touched, for a bad option
        as from ``validate_create``, for a secret when nothing is to be encrypted, and for none when something is.
        """
        raise NotImplementedError

    @abstractmethod
    def info(self) -> ImageInfo:
        """The facts of this layer."""

    # --- the mapping ---------------------------------------------------------------------------------------------

    @abstractmethod
    def lookup(self, offset: int, length: int) -> Run | None:
        """What this layer has at ``offset``, for at most ``length`` bytes (the caller keeps both inside ``size``)."""

    def linear_offset(self) -> int | None:
        """Host offset of guest offset 0 if the whole disk lies in one piece of ``data``; None where it is mapped."""
        return None

    async def load(self, offset: int) -> None:
        """Bring the table ``lookup(offset)`` needs into memory. OSError, or RequestError(EIO) for a corrupt table."""

    @abstractmethod
    def iter_runs(self, start: int, end: int) -> RunStream:
        """The mapping of ``[start, end)`` in large vectorised pieces; works on the tables as they are in memory."""

    async def read_compressed(self, offset: int) -> tuple[int, bytes]:
        """The COMPRESSED unit that contains ``offset``: the guest offset where it begins, and its content.

        Units need not be aligned, or all of one size. RequestError(EIO) when the stored form is damaged.
        """
        raise NotImplementedError

    async def stored_bitmaps(self) -> Sequence[BitmapInfo] | None:
        """The dirty bitmaps that the image holds; None when it cannot hold any.

        Those that record are in use when the image was opened for writing, but with the option ``keep_bitmaps``.
        """
        return None

    async def stored_bitmap(self, name: str) -> DirtyBitmap | None:
        """The one of that name, independent of the image; read-only if that is. None when there is none."""
        return None

    # --- changing it ---------------------------------------------------------------------------------------------

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """Where ``offset`` may be overwritten: ``(DATA, n, host_offset)`` in place, ``(UNALLOCATED, n, -1)``: allocate.

        RequestError(EIO) where the mapping points into the image's own metadata.
        """
        raise NotImplementedError

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """New host space for the start of ``[offset, offset + length)``, a multiple of ``granularity``; may cover less.

        Invisible until ``publish``. The caller fills every byte of it that is not known to be right (``zeroed``).
        OSError(ENOSPC) when the format cannot address more.
        """
        raise NotImplementedError

    async def write_compressed(self, offset: int, data: ReadBuffer) -> None:
        """Store whole clusters from ``offset`` on, compressed where that makes them smaller; shown on return.

        ``data`` ends with a cluster, or with the disk. RequestError where this image cannot have such.
        """
        raise NotImplementedError

    async def prepare(self, offset: int, length: int) -> None:
        """Bring into memory what ``allocate`` needs. RoomNeededError: ``make_room`` has to come first."""

    async def make_room(self) -> None:
        """Rearrange the file for the first allocation, if it has to be. Stable on return; the guest sees no change.

        No request is under way; host offsets that were known are void afterwards. OSError, RequestError.
        """

    def publish(self, allocation: Allocation) -> None:
        """The data is written: the guest range is now at the allocation. What was there before is released."""
        raise NotImplementedError

    def abandon(self, allocation: Allocation) -> None:
        """The data could not be written: give the host space back."""
        raise NotImplementedError

    def zero(self, offset: int, length: int, *, unmap: bool) -> int | None:
        """Map the start of the range (a multiple of ``granularity``) to zeroes; the bytes done, at least one unit.

        With ``unmap`` host space is released, without it kept. 0: this layer cannot; the caller writes zeroes.
        """
        return 0

    def discard(self, offset: int, length: int) -> int | None:
        """Release the start of the range (a multiple of ``granularity``); the bytes done.

        It never lets the content of a backing layer appear. 0: this layer cannot; nothing happens.
        """
        return 0

    async def resize(self, size: int) -> None:
        """Change the virtual size to ``size`` bytes; what is new reads as zeroes. Stable on return.

        ConfigError when the format cannot have that size, or cannot shrink.
        """
        raise NotImplementedError

    async def preallocate(self, start: int, end: int, mode: str) -> None:
        """Give ``[start, end)``, the end of the disk, which reads as zeroes, host space of its own. Stable on return.

        ``mode`` is one of ``preallocation_modes``: ``metadata`` maps it, ``falloc`` reserves disk space for it as well,
        ``full`` writes zeroes to it. OSError(ENOSPC) leaves a part of it done.
        """
        raise NotImplementedError

    async def make_empty(self) -> None:
        """Hold nothing any more, as if the image were new: the layer below shows everywhere. Stable on return."""
        raise NotImplementedError

    async def set_backing(self, reference: BackingReference | None, backing: FormatDriver | None = None) -> None:
        """Name another backing file in the header, or none, whatever that makes of the guest's content.

        Everything written before is stable first; the new name is on return, and a crash leaves the old one or the new
        one where the format has a place for both (each driver says so). ``backing`` is the open image of that name,
        where the format keeps its identity (``needs_open_backing``); of such a format an image that had no backing file
        may only be closed when it has got one. ConfigError, with nothing changed, when the header cannot say it: no
        room, or a format it has no word for.
        """
        raise NotImplementedError

    async def amend(self, options: Mapping[str, str]) -> None:
        """Change what ``create`` decided. Options are strings as after ``-o``, of ``amend_options``. Stable on return.

        No request is under way; what the engine remembers of the mapping is void afterwards. ConfigError, with nothing
        changed, for what cannot be; CorruptImageError for an image that has to be repaired first.
        """
        raise NotImplementedError

    async def amend_keys(
        self, options: Mapping[str, str], secrets: Mapping[str, bytes], *, secret: bytes | None, force: bool = False
    ) -> None:
        """Give an encrypted image another passphrase, or take one away; it may be in use. Stable on return.

        ``options`` are of ``key_options``; they name ``secrets`` by their ids. ``secret`` is the passphrase it was
        opened with, None if none was needed. ConfigError, with nothing changed, for what cannot be, and without
        ``force`` for what may leave nobody who can open it; ImageError where ``secret`` does not.
        """
        raise NotImplementedError

    async def opens_with(self, secret: bytes) -> bool:
        """Whether the passphrase opens the encrypted image as it is now, whatever it was opened with."""
        raise NotImplementedError

    # --- internal snapshots ----------------------------------------------------------------------------------------

    async def create_snapshot(self, name: str, *, icount: int | None = None) -> SnapshotInfo:
        """Keep the disk as it is now. Stable on return.

        No request is under way, here and for the other two; what the engine remembers of the mapping is void afterwards
        (``Node.reshape``). ``icount`` is what a virtual machine counts.
        ConfigError for an impossible name, CorruptImageError for an image that has to be repaired first,
        RequestError(ENOTSUP) for one that has no snapshots.
        """
        raise NotImplementedError

    async def apply_snapshot(self, wanted: str) -> None:
        """Make the disk, its size included, what the snapshot with this id, or else this name, has.

        ImageError: there is none.
        """
        raise NotImplementedError

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Forget a snapshot. ImageError: there is none with this id."""
        raise NotImplementedError

    async def check_new_bitmap(self, bitmap: DirtyBitmap) -> None:
        """ConfigError, with QEMU's reason, when the image cannot hold ``bitmap`` besides those it has."""
        raise ConfigError(f"Can't store persistent bitmaps to {self.path}: Operation not supported")

    async def store_bitmaps(self, changes: Mapping[str, DirtyBitmap | None]) -> None:
        """Under each of these names the image holds the bitmap, or none any more; what else it holds stays.

        Stable on return. A crash at any point leaves all as they were before or all as they are after it.
        ConfigError as of ``check_new_bitmap``.
        """
        raise NotImplementedError

    async def flush(self) -> None:
        """All changes of the mapping published before this call, and the data behind them, are stable on return."""
        await self.data.flush()

    async def check(self, *, repair_leaks: bool = False, repair_errors: bool = False) -> CheckResult:
        """Compare the image's metadata with itself. Repairing needs a writable open."""
        raise NotImplementedError

    @abstractmethod
    async def close(self) -> None:
        """Flush if writable, mark the image cleanly closed, and release the storages."""

    # --- capabilities --------------------------------------------------------------------------------------------

    @classmethod
    def can(cls, method: str) -> bool:
        """Whether the driver defines the optional ``method`` (``"create"``, ``"allocate"``, ``"check"``, ...)."""
        own, base = getattr(cls, method), getattr(FormatDriver, method)
        return getattr(own, "__func__", own) is not getattr(base, "__func__", base)
