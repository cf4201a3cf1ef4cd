"""Opening a chain: from what the user asks for, down the backing files, under the image roots."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.block.window import NodeStorage
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.probe import probe
from nbdserve.formats.registry import DRIVERS, driver_for
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage
from nbdserve.storage.nbd_target import is_nbd
from nbdserve.storage.roots import ImageRoots
from nbdserve.units import align_up

if TYPE_CHECKING:
    from nbdserve.storage.nbd import NbdStorage

MAX_CHAIN_DEPTH: Final = 64
"""Layers of one chain. A chain that loops is found by the identity of its files long before."""
MAX_COMPANIONS: Final = 1024
"""Files one image may consist of, each of which takes a descriptor. 2 TiB in extents of 2 GiB are 1024."""
_ITSELF: Final = "it is the image itself"
_LOOPS: Final = "the chain loops: it is a layer already"


async def open_image(spec: ImageSpec, roots: ImageRoots | None = None) -> Node:
    """Open the whole chain under ``spec``.

    ``roots`` bound the files that headers may name; by default the directory of the image and below. Raises ImageError
    naming the file at fault; nothing stays open then, and nothing was modified.
    """
    roots = roots or image_roots(spec.path)
    if spec.format != "raw" and (spec.offset or spec.size is not None):
        spec = await _window(spec, roots)
    layers: list[FormatDriver] = []
    if _may_change_at_open(spec):
        async with AsyncExitStack() as files:
            await _open_layers(replace(spec, read_only=True), roots, [], files, locked=True)
    async with AsyncExitStack() as files:
        probed_raw = await _open_layers(spec, roots, layers, files)
        _refuse_idle_secret(spec, layers)
        if spec.overlay:
            layers.insert(0, await _temporary_overlay(layers[0]))
        files.pop_all()
    return Node(
        layers,
        unmap=spec.discard == "unmap",
        detect_zeroes=spec.detect_zeroes,
        writethrough=spec.writethrough,
        guard_probed_raw=probed_raw and not layers[0].read_only,
    )


def _may_change_at_open(spec: ImageSpec) -> bool:
    """Whether the chain is opened to be read first, so that a layer below that cannot be opened is met before.

    Some formats repair an image, or replay its log, when it is opened for writing. Left out is what can be opened only
    once; what is encrypted stays locked, for its passphrase takes seconds.
    """
    if spec.read_only or spec.overlay or spec.snapshot is not None or spec.backing is None or spec.format == "raw":
        return False
    return spec.file is None and spec.nbd is None and spec.opened is None


async def _window(spec: ImageSpec, roots: ImageRoots) -> ImageSpec:
    """What to open for a window of an image not said to be raw: if it is not, a raw image on the disk of that one."""
    name = spec.format
    if name is None:
        storage = await _open_storage(spec, roots, read_only=True)
        try:
            name = await probe(storage)
        finally:
            await storage.close()
        if name == "raw":
            return spec
    return ImageSpec(
        spec.path,
        "raw",
        read_only=spec.read_only or spec.snapshot is not None,
        offset=spec.offset,
        size=spec.size,
        cache=spec.cache,
        discard=spec.discard,
        detect_zeroes=spec.detect_zeroes,
        file=replace(spec, format=name, offset=0, size=None, detect_zeroes="off"),
    )


async def _open_storage(spec: ImageSpec, roots: ImageRoots, *, read_only: bool) -> Storage:
    if spec.opened is not None:
        return spec.opened
    if spec.file is not None:
        return NodeStorage(await open_image(replace(spec.file, read_only=spec.file.read_only or read_only), roots))
    return await open_storage(spec, read_only=read_only)


async def open_storage(spec: ImageSpec, *, read_only: bool) -> FileStorage | NbdStorage:
    """The file or NBD export the user named, with the bytes of an image; ImageError when it cannot be opened."""
    if spec.nbd is not None:
        from nbdserve.storage.nbd import NbdStorage  # noqa: PLC0415  (25 ms that files do not need)

        return await NbdStorage.open(spec.nbd, read_only=read_only)
    return await FileStorage.open(spec.path, read_only=read_only, cache=spec.cache, force_share=spec.force_share)


def image_roots(path: str, more: Sequence[Path] = ()) -> ImageRoots:
    """Where the files lie that the headers of the image ``path`` may name: beside it and below, or below ``more``.

    Beside an image on an NBD server is nothing. ImageError where there is no directory of the image.
    """
    if is_nbd(path):
        return ImageRoots(more)
    directory = Path(path).absolute().parent
    try:
        directory.stat()
    except OSError as error:
        raise ImageError(path, f"cannot be opened: {error.strerror}") from error
    return ImageRoots([directory, *more])


def _refuse_idle_secret(spec: ImageSpec, layers: list[FormatDriver]) -> None:
    """Who gives a passphrase takes the image to be encrypted, and does not want it to be served if it is not."""
    if spec.secret is not None and not any(layer.info().encrypted for layer in layers):
        raise ConfigError(f"{spec.path}: a secret is given, and the image is not encrypted")


async def open_alone(
    storage: Storage,
    name: str,
    roots: ImageRoots | None = None,
    *,
    force_share: bool = False,
    to_check: bool = False,
) -> FormatDriver:
    """One layer by itself, for looking at its metadata: the driver is read-only, also where ``storage`` is not.

    No guest byte can be read: its backing file stays closed, so does what holds nothing but guest data, unless the
    image is opened ``to_check`` it, without which it is not whole; and no secret is needed. A failed open closes
    ``storage``.
    """
    roots = roots or image_roots(storage.path)
    async with AsyncExitStack() as files:
        files.push_async_callback(storage.close)
        driver = driver_for(name, storage.path)
        options: dict[str, Any] = {"has_backing": True, "metadata_only": True}
        options["companions"] = await _open_companions(
            driver,
            storage,
            roots,
            files,
            read_only=storage.read_only,
            force_share=force_share,
            metadata_only=not to_check,
        )
        layer = await driver.open(storage, options, read_only=True)
        if to_check and layer.backing is not None and layer.can("see_backing"):
            _show_backing(layer, layer.backing.name, roots)
        files.pop_all()
    return layer


def _show_backing(layer: FormatDriver, name: str, roots: ImageRoots) -> None:
    try:
        fd = _open_beneath(roots, name, layer.path, "backing file", {})
    except ImageError as error:
        layer.see_backing(None, str(error))
        return
    changed_at = os.fstat(fd).st_mtime
    os.close(fd)
    layer.see_backing(changed_at, "")


async def _open_layers(
    spec: ImageSpec,
    roots: ImageRoots,
    layers: list[FormatDriver],
    files: AsyncExitStack,
    *,
    locked: bool = False,
) -> bool:
    """Append the layers from ``spec`` down; whether the first was probed to be raw. ``files`` closes all of them.

    ``locked``: no passphrase is tried.
    """
    read_only = spec.read_only or spec.overlay or spec.snapshot is not None
    storage = await _open_storage(spec, roots, read_only=read_only)
    probed_raw = False
    seen: dict[tuple[int, int], str] = {}
    while True:
        files.push_async_callback(storage.close)
        _refuse_loop(storage, seen, layers)
        name = spec.format
        if name is None:
            name = await probe(storage)
            probed_raw = not layers and name == "raw"
        metadata_only = locked and spec.secret is not None
        layer = await open_layer(storage, name, spec, roots, files, read_only=read_only, metadata_only=metadata_only)
        if layers:
            layers[-1].accept_backing(layer)
        layers.append(layer)
        if spec.backing is None or (spec.backing == "header" and layer.backing is None):
            return probed_raw
        read_only = True
        if isinstance(spec.backing, ImageSpec) and spec.backing.path:
            spec = spec.backing
            storage = await _open_storage(spec, roots, read_only=True)
        else:
            try:
                spec, storage = await _open_named(layer, spec, roots, seen)
            except ImageError:
                if not layer.stands_alone:
                    raise
                return probed_raw


async def _open_named(
    layer: FormatDriver, spec: ImageSpec, roots: ImageRoots, seen: Mapping[tuple[int, int], str]
) -> tuple[ImageSpec, Storage]:
    """The backing file the header of ``layer`` names, in the format the user gave for it or the header declares."""
    below = spec.backing if isinstance(spec.backing, ImageSpec) else ImageSpec("")
    backing = layer.backing
    if backing is None:
        raise ImageError(
            layer.path, "the header names none, and the options give no file for it", field="backing file", value=None
        )
    format_name = below.format or backing.format
    if format_name is None:
        hint = f"qemu-img rebase -u -F FORMAT -b {backing.name} {layer.path}"
        if not layer.declares_backing_format:
            told = {"driver": layer.name, "file.filename": layer.path, "backing.driver": "FORMAT"}
            hint = f"{layer.name} headers have no room for it, so say it at each use: json:{json.dumps(told)}"
        raise ImageError(
            layer.path,
            "the header declares no format for it, and a backing format is never guessed",
            field="backing file",
            value=backing.name,
            hint=hint,
        )
    if format_name not in DRIVERS and below.format is None:
        raise ImageError(
            layer.path,
            f"there is no such image format, there are {', '.join(sorted(DRIVERS))}",
            field="backing format",
            value=format_name,
        )
    fd = _open_beneath(roots, backing.name, layer.path, "backing file", dict.fromkeys(seen, _LOOPS))
    path = str(Path(layer.path).parent / backing.name)
    storage = await FileStorage.from_fd(fd, path, cache=spec.cache, force_share=spec.force_share)
    opened = replace(
        below,
        path=path,
        format=format_name,
        read_only=True,
        cache=spec.cache,
        force_share=spec.force_share,
        secret=spec.secret if below.secret is None else below.secret,
        unlock_seconds=spec.unlock_seconds,
    )
    return opened, storage


def _refuse_loop(storage: Storage, seen: dict[tuple[int, int], str], layers: list[FormatDriver]) -> None:
    if isinstance(storage, FileStorage):  # a header names files only, so no loop goes through anything else
        if storage.identity in seen:
            raise ImageError(storage.path, "the chain loops: this file is already a layer of it", field="backing file")
        seen[storage.identity] = storage.path
    if len(layers) >= MAX_CHAIN_DEPTH:
        raise ImageError(
            layers[0].path,
            f"the chain has more than {MAX_CHAIN_DEPTH} layers",
            field="backing file",
            value=storage.path,
        )


async def open_layer(
    storage: Storage,
    name: str,
    spec: ImageSpec,
    roots: ImageRoots,
    files: AsyncExitStack,
    *,
    read_only: bool,
    metadata_only: bool = False,
) -> FormatDriver:
    """One layer of a chain, on its open file, which ``files`` closes like everything else. ImageError, OSError."""
    driver = driver_for(name, storage.path)
    options: dict[str, Any] = {
        "discard": spec.discard,
        "has_backing": spec.gets_backing or isinstance(spec.backing, ImageSpec),
        "secret": spec.secret,
        "unlock_seconds": spec.unlock_seconds,
        "metadata_only": metadata_only,
        "keep_bitmaps": spec.keep_bitmaps,
    }
    if name == "raw":
        options |= {"offset": spec.offset, "size": spec.size}
    elif spec.offset or spec.size is not None:
        raise ConfigError(f"{spec.path}: offset and size of a backing image need format raw, and this one is {name}")
    if spec.snapshot is not None:
        if not driver.has_snapshots:
            raise ConfigError(f"{spec.path}: {name} images have no internal snapshots (snapshot {spec.snapshot!r})")
        options["snapshot"] = spec.snapshot
    if spec.data_file is not None:
        if not driver.takes_data_file:
            raise ConfigError(f"{spec.path}: {name} images have no external data file")
        options["companions"] = [await _open_data_file(storage, spec, spec.data_file, files, read_only=read_only)]
    else:
        options["companions"] = await _open_companions(
            driver, storage, roots, files, read_only=read_only, cache=spec.cache, force_share=spec.force_share
        )
    layer = await driver.open(storage, options, read_only=read_only)
    layer.origin = Origin(replace(spec, format=name), roots)
    return layer


@dataclass(frozen=True, slots=True)
class Origin:
    """How a layer was opened: ``FormatDriver.origin``."""

    spec: ImageSpec
    """Of this layer, with the format it has."""
    roots: ImageRoots


async def _open_data_file(
    storage: Storage, spec: ImageSpec, chosen: ImageSpec, files: AsyncExitStack, *, read_only: bool
) -> Storage:
    """The data file the user gave."""
    chosen = replace(chosen, cache=spec.cache, force_share=spec.force_share)
    data_file = chosen.opened or await open_storage(chosen, read_only=read_only)
    files.push_async_callback(data_file.close)
    if isinstance(data_file, FileStorage) and data_file.identity == _file_identity(storage):
        raise ImageError(storage.path, _ITSELF, field="data file", value=data_file.path)
    return data_file


def _file_identity(storage: Storage) -> tuple[int, int] | None:
    """That of the file at the bottom; None when there is no file."""
    while isinstance(storage, NodeStorage):
        storage = storage.node.top.storage
    return storage.identity if isinstance(storage, FileStorage) else None


async def _open_companions(
    driver: type[FormatDriver],
    storage: Storage,
    roots: ImageRoots,
    files: AsyncExitStack,
    *,
    read_only: bool,
    cache: str = "writeback",
    force_share: bool = False,
    metadata_only: bool = False,
) -> list[Storage]:
    """The other files of the image on ``storage``, as its header names them."""
    companions = await driver.companions(storage)
    if len(companions) > MAX_COMPANIONS:
        raise ImageError(
            storage.path,
            f"an image has at most {MAX_COMPANIONS} files",
            field=companions[MAX_COMPANIONS].field,
            value=companions[MAX_COMPANIONS].name,
        )
    opened: list[Storage] = []
    identity = _file_identity(storage)
    own: dict[tuple[int, int], str] = {} if identity is None else {identity: _ITSELF}
    for companion in companions:
        if metadata_only and companion.guest_data_only:
            opened.append(storage)
            continue
        writable = not (read_only or companion.read_only)
        fd = _open_beneath(
            roots, companion.name, storage.path, companion.field, own, os.O_RDWR if writable else os.O_RDONLY
        )
        path = str(Path(storage.path).parent / companion.name)
        file = await FileStorage.from_fd(fd, path, cache=cache, force_share=force_share)
        files.push_async_callback(file.close)
        own[file.identity] = "it is another part of the image already"
        opened.append(file)
    return opened


def _open_beneath(
    roots: ImageRoots,
    name: str,
    named_by: str,
    field: str,
    known: Mapping[tuple[int, int], str],
    access: int = os.O_RDONLY,
) -> int:
    """The descriptor of the file a header names; ImageError when it is one of ``known``, with what it is there.

    This is found before the file is locked: the lock would be refused, as if another process had the file.
    """
    if is_nbd(named_by) and not name.startswith("/"):
        raise ImageError(
            named_by, "an image on an NBD server has no directory to look in; give the file", field=field, value=name
        )
    fd = roots.open_beneath(name, relative_to=named_by, flags=access | os.O_CLOEXEC, field=field)
    status = os.fstat(fd)
    problem = known.get((status.st_dev, status.st_ino))
    if problem is not None:
        os.close(fd)
        raise ImageError(named_by, problem, field=field, value=name)
    return fd


async def _temporary_overlay(base: FormatDriver) -> FormatDriver:
    """An empty qcow2 in a nameless file of the temporary directory, to take the writes that are to be dropped."""
    with tempfile.TemporaryFile() as file:
        fd = os.dup(file.fileno())
    storage = await FileStorage.from_fd(fd, f"{base.path} (temporary overlay)", cache="unsafe", locking=False)
    driver = driver_for("qcow2")
    try:
        await driver.create(storage, align_up(base.size, 512), {})
        return await driver.open(storage, {"discard": "unmap"}, read_only=False)
    except BaseException:
        await storage.close()
        raise
