"""A format of several files, for tests of what opens and makes them: the header is a list of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from nbdserve.errors import ConfigError, ImageError
from nbdserve.extents import DATA, Run, RunArray, RunStream
from nbdserve.formats.base import BackingReference, Companion, CreateOption, FormatDriver, ImageInfo
from nbdserve.storage.base import Storage


class PartsDriver(FormatDriver):
    """The disk is the first part. The lines of the file: ``-name`` is a part that is never written, ``+name`` one of
    guest data, ``<name`` the backing file, ``=name`` what the backing file has to be called, ``*`` makes it encrypted.
    """

    name: ClassVar[str] = "parts"
    create_options: ClassVar[tuple[CreateOption, ...]] = (
        CreateOption("backing_file", "Below"),
        CreateOption("backing_fmt", "Its format"),
        CreateOption("size", "Its size"),
        CreateOption("count", "Parts", "1"),
        CreateOption("encrypt.key-secret", "ID of the passphrase"),
    )
    opened: ClassVar[list[PartsDriver]] = []
    """Every image opened, for the test to look at."""

    def __init__(self, storage: Storage, options: Mapping[str, Any], lines: Sequence[str], *, read_only: bool) -> None:
        self.path, self.storage, self.read_only = storage.path, storage, read_only
        self.parts: list[Storage] = options["companions"]
        self.data = self.parts[0] if self.parts else storage
        self.options = dict(options)
        self.size = self.data.size
        self.cluster_size = self.granularity = 1
        self.expected = [line[1:] for line in lines if line.startswith("=")]
        self.encrypted = "*" in lines
        self.accepted: list[FormatDriver] = []
        for line in lines:
            if line.startswith("<"):
                self.backing = BackingReference(line[1:], self.name)

    @classmethod
    async def companions(cls, storage: Storage) -> Sequence[Companion]:
        lines = await _lines(storage)
        return [
            Companion(line.lstrip("+-"), "part", read_only=line[0] == "-", guest_data_only=line[0] == "+")
            for line in lines
            if line[0] not in "<=!*"
        ]

    @classmethod
    async def open(cls, storage: Storage, options: Mapping[str, Any], *, read_only: bool) -> Self:
        lines = await _lines(storage)
        if "!" in lines:
            raise ImageError(storage.path, "bad", field="line", value="!")
        driver = cls(storage, options, lines, read_only=read_only)
        cls.opened.append(driver)
        return driver

    def accept_backing(self, backing: FormatDriver) -> None:
        self.accepted.append(backing)
        if self.expected and not backing.path.endswith(self.expected[0]):
            raise ImageError(self.path, "not the parent", field="parent", value=self.expected[0])

    @classmethod
    def validate_create(cls, size: int, options: Mapping[str, str]) -> None:
        cls.check_option_names(options)
        if size % 1024:
            raise ConfigError(f"size {size}: a multiple of 1024")

    @classmethod
    def created_companions(cls, path: str, size: int, options: Mapping[str, str]) -> Sequence[str]:
        return [f"part{i}" for i in range(int(options.get("count", "1")))]

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
        for part in companions:
            await part.truncate(size)
        lines = [part.path.rpartition("/")[2] for part in companions]
        if backing is not None:
            lines.append(f"={backing.path.rpartition('/')[2]}")
        if secret is not None:
            lines.append(f"secret {secret!r}")
        await storage.write(0, "\n".join(lines).encode())

    def info(self) -> ImageInfo:
        return ImageInfo(self.name, self.size, backing=self.backing, encrypted=self.encrypted)

    def lookup(self, offset: int, length: int) -> Run:
        return DATA, length, offset

    def lookup_writable(self, offset: int, length: int) -> Run:
        return DATA, length, offset

    async def iter_runs(self, start: int, end: int) -> RunStream:
        yield RunArray.of(start, end - start, DATA, start)

    async def close(self) -> None:
        for storage in {*self.parts, self.storage}:
            await storage.close()


async def _lines(storage: Storage) -> list[str]:
    return (await storage.read(0, storage.size)).decode().split()
