"""qcow2 as a format: what can be made, and what an image says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

from nbdserve.errors import ConfigError
from nbdserve.formats.base import CreateOption, FormatDriver, ImageInfo
from nbdserve.formats.luks.options import KEY_OPTIONS
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.create import CREATE_OPTIONS, create_qcow2, parse_encryption, plan_image, virtual_size
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.snapshots import Snapshot, describe
from nbdserve.storage.base import Storage

if TYPE_CHECKING:
    from nbdserve.formats.luks.layout import Header as LuksHeader

AMENDABLE: Final = (
    "backing_file",
    "backing_fmt",
    "compat",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "refcount_bits",
)
_AMEND_OPTIONS: Final = tuple(replace(option, default="") for option in CREATE_OPTIONS if option.name in AMENDABLE)
_ENCRYPT: Final = "encrypt."
_KEY_OPTIONS: Final = tuple(replace(option, name=_ENCRYPT + option.name) for option in KEY_OPTIONS)


class Qcow2Format(FormatDriver):
    """The parts of the driver that need neither tables nor data."""

    name: ClassVar[str] = "qcow2"
    create_options: ClassVar[tuple[CreateOption, ...]] = CREATE_OPTIONS
    amend_options: ClassVar[tuple[CreateOption, ...]] = _AMEND_OPTIONS
    key_options: ClassVar[tuple[CreateOption, ...]] = _KEY_OPTIONS
    backing_formats: ClassVar[tuple[str, ...] | None] = None
    has_snapshots: ClassVar[bool] = True
    abandons_freely: ClassVar[bool] = True
    takes_data_file: ClassVar[bool] = True
    zeroes_with_rest: ClassVar[bool] = True
    preallocation_modes: ClassVar[tuple[str, ...]] = ("metadata", "falloc", "full")

    header: Header
    snapshots: Sequence[Snapshot] = ()
    _luks_header: LuksHeader | None = None
    _changing_keys: asyncio.Lock
    _marking: asyncio.Task[None] | None = None
    """Sets the corrupt bit in the header."""

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """ConfigError as for ``create``."""
        plan_image(size, options)

    @classmethod
    def encrypts(cls, options: Mapping[str, str]) -> bool:
        """With ``encrypt.format``."""
        return parse_encryption(options) is not None

    @classmethod
    def created_size(cls, size: int, options: Mapping[str, str]) -> int:
        """Whole sectors."""
        return virtual_size(size)

    @classmethod
    def created_companions(cls, path: str, size: int, options: Mapping[str, str]) -> Sequence[str]:
        """The external data file."""
        return (options["data_file"],) if options.get("data_file") else ()

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
        """Make ``storage`` an empty image of ``size`` bytes."""
        data_file = companions[0] if companions else None
        await create_qcow2(storage, size, options, data_file_storage=data_file, secret=secret)

    async def amend_keys(
        self, options: Mapping[str, str], secrets: Mapping[str, bytes], *, secret: bytes | None, force: bool = False
    ) -> None:
        """Change the key slots of LUKS, where the driver was opened read-only, too."""
        from nbdserve.formats.luks.key_slots import change_key_slots, parse_slot_change  # noqa: PLC0415  (rarely needed)

        change = parse_slot_change(options, secrets, _ENCRYPT)
        if self.header.crypt_method == layout.CRYPT_NONE:
            raise ConfigError("image is not encrypted, can't amend")
        if self.header.luks_area is None:
            raise ConfigError("Only LUKS encryption options can be amended for qcow2")
        offset, length = self.header.luks_area
        async with self._changing_keys:
            self._luks_header = await change_key_slots(self.storage, offset, length, change, secret=secret, force=force)

    async def opens_with(self, secret: bytes) -> bool:
        """Whether it opens a key slot of LUKS."""
        from nbdserve.formats.luks.keys import opens  # noqa: PLC0415  (rarely needed)

        assert self._luks_header is not None
        assert self.header.luks_area is not None
        return await opens(self._luks_header, self.storage, self.header.luks_area[0], secret)

    def info(self) -> ImageInfo:
        """The facts of this layer."""
        header = self.header
        specific: dict[str, Any] = {"compat": "0.10" if header.version == 2 else "1.1"}
        specific["compression-type"] = layout.COMPRESSION_NAMES[header.compression_type]
        specific["refcount-bits"] = header.refcount_bits
        if header.version >= 3:
            specific["lazy-refcounts"] = bool(header.compatible & layout.COMPATIBLE_LAZY_REFCOUNTS)
            specific["corrupt"] = bool(self._marking or header.incompatible & layout.INCOMPATIBLE_CORRUPT)
            specific["extended-l2"] = header.extended_l2
        if header.crypt_method != layout.CRYPT_NONE:
            name, luks_header = layout.CRYPT_NAMES[header.crypt_method], self._luks_header
            specific["encrypt"] = {"format": name} if luks_header is None else luks_header.describe(name)
        if header.has_data_file:
            specific["data-file"] = header.data_file_name
            specific["data-file-raw"] = header.data_file_raw
        return ImageInfo(
            format=self.name,
            virtual_size=self.size,
            cluster_size=header.cluster_size,
            backing=self.backing,
            dirty=bool(header.incompatible & layout.INCOMPATIBLE_DIRTY),
            encrypted=header.crypt_method != layout.CRYPT_NONE,
            specific=specific,
            snapshots=[describe(snapshot, header) for snapshot in self.snapshots],
        )
