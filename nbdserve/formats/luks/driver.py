"""The luks driver: a LUKS version 1 header, and behind it the disk, encrypted sector by sector."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from nbdserve.errors import ConfigError, CorruptImageError
from nbdserve.extents import DATA, Run, RunArray, RunStream
from nbdserve.formats.base import CreateOption, FormatDriver, ImageInfo
from nbdserve.formats.encryption.ciphers import SectorCipher
from nbdserve.formats.encryption.storage import EncryptedStorage
from nbdserve.formats.luks import layout
from nbdserve.formats.luks.create import new_volume, parse_volume_options, passphrase
from nbdserve.formats.luks.key_slots import change_key_slots, parse_slot_change
from nbdserve.formats.luks.keys import open_volume, opens
from nbdserve.formats.luks.layout import Header
from nbdserve.formats.luks.options import KEY_OPTIONS, VOLUME_OPTIONS
from nbdserve.storage.base import Storage
from nbdserve.units import SECTOR_SIZE, align_up

MAX_SIZE = (1 << 63) - (1 << 32)
"""Bytes of a disk, with its header behind what a file offset can say."""


class LuksDriver(FormatDriver):
    """One open LUKS volume. Every byte is DATA: what was never written reads as noise."""

    name = "luks"
    create_options: ClassVar[tuple[CreateOption, ...]] = (*VOLUME_OPTIONS, CreateOption("size", "Virtual disk size"))
    key_options: ClassVar[tuple[CreateOption, ...]] = KEY_OPTIONS

    def __init__(self, storage: Storage, header: Header, cipher: SectorCipher, *, read_only: bool) -> None:
        self.path = storage.path
        self.storage = storage
        self.data = EncryptedStorage(storage, cipher, start=header.payload_offset)
        self.header = header
        self.read_only = read_only
        self.size = align_up(storage.size - header.payload_offset, SECTOR_SIZE)
        self.cluster_size = self.granularity = 1
        self.keeps_places = True
        self._changing_keys = asyncio.Lock()

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        """Open the volume. Options: ``secret``, the passphrase; ``metadata_only``, which needs none."""
        header = Header.parse(await storage.read(0, layout.HEADER_BYTES), storage.path, storage.size)
        if header.payload_offset > storage.size:
            raise CorruptImageError(
                storage.path,
                f"is behind the end of the file of {storage.size} bytes",
                field="LUKS payload offset sector",
                value=header.payload_offset // SECTOR_SIZE,
            )
        cipher = await open_volume(header, storage, 0, options)
        return cls(storage, header, cipher, read_only=read_only)

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        """The options, and a size that a file can have."""
        cls.check_option_names(options)
        parse_volume_options(options)
        if size > MAX_SIZE:
            raise ConfigError(f"size={size}: a LUKS volume has at most {MAX_SIZE} bytes")

    @classmethod
    def encrypts(cls, options: Mapping[str, str]) -> bool:
        """Always."""
        return True

    @classmethod
    def created_size(cls, size: int, options: Mapping[str, str]) -> int:
        """Whole sectors."""
        return align_up(size, SECTOR_SIZE)

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
        """A volume of ``size`` bytes with one passphrase. The disk is a hole of the file, and so reads as noise."""
        cls.validate_create(size, options)
        header, pieces = await new_volume(parse_volume_options(options), passphrase(secret))
        await storage.truncate(0)
        await storage.truncate(header.payload_offset + cls.created_size(size, options))
        await storage.write_stable(pieces[1:])
        # Only a volume with its key gets its header: a crash before this leaves a file that nobody takes for one.
        await storage.write_stable(pieces[:1])

    def info(self) -> ImageInfo:
        return ImageInfo(self.name, self.size, encrypted=True, specific=self.header.describe())

    def linear_offset(self) -> int:
        return 0

    def lookup(self, offset: int, length: int) -> Run:
        return DATA, length, offset

    def lookup_writable(self, offset: int, length: int) -> Run:
        return DATA, length, offset

    async def iter_runs(self, start: int, end: int) -> RunStream:
        # Without a host offset: the bytes that are there are not the guest's.
        yield RunArray.of(start, end - start, DATA)

    async def resize(self, size: int) -> None:
        """Set the size, in whole sectors; new space reads as noise."""
        size = align_up(size, SECTOR_SIZE)
        await self.data.truncate(size)
        await self.data.flush()
        self.size = size

    async def amend_keys(
        self, options: Mapping[str, str], secrets: Mapping[str, bytes], *, secret: bytes | None, force: bool = False
    ) -> None:
        """Change key slots, where the driver was opened read-only, too."""
        change = parse_slot_change(options, secrets)
        async with self._changing_keys:
            self.header = await change_key_slots(self.storage, 0, self.storage.size, change, secret=secret, force=force)

    async def opens_with(self, secret: bytes) -> bool:
        """Whether it opens a key slot."""
        return await opens(self.header, self.storage, 0, secret)

    async def close(self) -> None:
        """Flush and release; there is no clean-close mark."""
        try:
            if not self.read_only:
                await self.flush()
        finally:
            await self.data.close()
