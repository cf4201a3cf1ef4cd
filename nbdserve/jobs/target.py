"""The image that a conversion writes: made beside the file it replaces, or one that is there already."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType

from nbdserve.block.create import create_files
from nbdserve.block.graph import image_roots, open_alone, open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ConfigError, naming
from nbdserve.formats.base import FormatDriver
from nbdserve.jobs.beside import Beside, check_companion
from nbdserve.storage.file import FileStorage


@dataclass(frozen=True, slots=True)
class NewImage:
    """An image to make."""

    path: str
    driver: type[FormatDriver]
    size: int
    options: Mapping[str, str]
    """As after ``-o``; ``backing_file`` and ``backing_fmt`` go with ``base``."""
    base: ImageSpec | None = None
    """The backing file, as it is to be opened from here."""
    secret: bytes | None = None
    cache: str = "unsafe"
    """With ``unsafe`` nothing is synced, unless a file is replaced: then neither may be lost."""
    roots: Sequence[Path] = ()


class TargetImage:
    """A new image, open for writing; an async context manager, which removes what was not published."""

    def __init__(self, image: NewImage) -> None:
        self._image = image
        self._files = AsyncExitStack()
        self._beside: Beside | None = None
        self._companions: Sequence[str] = ()
        self._cache = image.cache
        self._place: str | None = None
        self.node: Node

    async def __aenter__(self) -> TargetImage:
        try:
            await self._open()
        except BaseException as error:
            await self._abort(error)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._abort(error)

    async def _abort(self, error: BaseException | None) -> None:
        """Remove it. The kernel's errors name the image as the user does, and not the place where it was made."""
        if isinstance(error, OSError) and self._place is not None and error.filename == self._place:
            error.filename = self._image.path
        with naming(self._image.path):
            await self._files.aclose()

    async def _open(self) -> None:
        image = self._image
        driver, options = image.driver, dict(image.options)
        driver.validate_create(image.size, options)
        if image.base is not None:
            _refuse_same(image.path, image.base.path)
        if image.secret is None and driver.encrypts(options):
            raise ConfigError(
                f"{image.path}: an encrypted image needs a secret: give --secret-file, --secret-env or --object"
            )
        self._companions = driver.created_companions(image.path, image.size, options)
        place = image.path
        if not _is_special(image.path):
            for name in self._companions:
                check_companion(image.path, name)
            self._beside = Beside(image.path)
            await self._beside.open(self._companions)
            self._files.push_async_callback(self._beside.close)
            place = self._place = self._beside.path
            if self._beside.replaces and self._cache == "unsafe":
                self._cache = "writeback"
        paths = [place, *(str(Path(place).parent / name) for name in self._companions)]
        for path in paths:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        await self._create(paths, options)
        self.node = await self._open_node(place)
        self.node.top.flags_zeroes = True
        self._files.push_async_callback(self.node.close)

    async def _create(self, paths: Sequence[str], options: Mapping[str, str]) -> None:
        image = self._image
        make = partial(create_files, image.driver, paths, image.size, options, secret=image.secret, cache=self._cache)
        if image.base is None:
            await make()
            return
        assert image.base.format is not None
        storage = await FileStorage.open(image.base.path, read_only=True, force_share=image.base.force_share)
        backing = await open_alone(storage, image.base.format, image_roots(image.base.path, image.roots))
        try:
            await make(backing=backing)
        finally:
            await backing.close()

    async def _open_node(self, place: str) -> Node:
        image = self._image
        if image.options.get("subformat") == "streamOptimized":
            storage = await FileStorage.open(place, cache=self._cache)
            try:
                return Node([await image.driver.open(storage, {"sequential": True}, read_only=False)])
            except BaseException:
                await storage.close()
                raise
        spec = ImageSpec(
            place,
            image.driver.name,
            cache=self._cache,
            discard="unmap",
            backing=image.base and replace(image.base, read_only=True),
            secret=image.secret,
        )
        below = [] if image.base is None else [Path(image.base.path).parent]
        return await open_image(spec, image_roots(place, [*image.roots, *below]))

    @property
    def zeroed(self) -> bool:
        """What is not written reads as zeroes."""
        top = self.node.top
        encrypted_whole = self._image.driver.name == "luks"
        return self._image.base is None and not encrypted_whole and (top.can("allocate") or top.data.grows_zeroed)

    async def publish(self) -> None:
        """Close the image, with everything in it that was written, and give it its name."""
        self._files.pop_all()
        try:
            with naming(self._image.path):
                await self.node.close()
                if self._beside is not None:
                    await self._beside.publish(self._companions, sync=self._cache != "unsafe")
        finally:
            if self._beside is not None:
                await self._beside.close()


def _refuse_same(path: str, base: str) -> None:
    """ConfigError where an image would replace its own backing file."""
    if os.path.realpath(path) == os.path.realpath(base):
        raise ConfigError(f"{path}: the image and its backing file are the same file")


def _is_special(path: str) -> bool:
    """A device is written in place."""
    return Path(path).exists() and not stat.S_ISREG(Path(path).stat().st_mode)
