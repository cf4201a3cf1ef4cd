"""Opening a chain: from what the user asks for, down the backing files, under the image roots."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.block.window import NodeStorage
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.base import FormatDriver
from nbdserve.formats.probe import probe
from nbdserve.formats.registry import driver_for
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage
from nbdserve.storage.roots import ImageRoots
from nbdserve.units import align_up

MAX_CHAIN_DEPTH: Final = 64
"""Layers of one chain. A chain that loops is found by the identity of its files long before."""


async def open_image(spec: ImageSpec, roots: ImageRoots | None = None) -> Node:
    """Open the whole chain under ``spec``.

    ``roots`` bound the files that headers may name; by default the directory of the image and below. Raises ImageError
    naming the file at fault; nothing stays open then, and nothing was modified.
    """
    roots = roots or ImageRoots.of_image(spec.path)
    if spec.format != "raw" and (spec.offset or spec.size is not None):
        spec = await _window(spec, roots)
    layers: list[FormatDriver] = []
    try:
        probed_raw = await _open_layers(spec, roots, layers)
        if spec.overlay:
            layers.insert(0, await _temporary_overlay(layers[0]))
    except BaseException:
        for layer in layers:
            await layer.storage.close()
            await layer.data.close()
        raise
    return Node(
        layers,
        unmap=spec.discard == "unmap",
        detect_zeroes=spec.detect_zeroes,
        writethrough=spec.writethrough,
        guard_probed_raw=probed_raw and not layers[0].read_only,
    )


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
    if spec.file is not None:
        return NodeStorage(await open_image(replace(spec.file, read_only=spec.file.read_only or read_only), roots))
    return await FileStorage.open(spec.path, read_only=read_only, cache=spec.cache, force_share=spec.force_share)


async def _open_layers(spec: ImageSpec, roots: ImageRoots, layers: list[FormatDriver]) -> bool:
    """Append the layers from ``spec`` down; whether the first one was probed to be raw."""
    read_only = spec.read_only or spec.overlay or spec.snapshot is not None
    storage = await _open_storage(spec, roots, read_only=read_only)
    probed_raw = False
    seen: dict[tuple[int, int], str] = {}
    while True:
        try:
            _refuse_loop(storage, seen, layers)
            name = spec.format
            if name is None:
                name = await probe(storage)
                probed_raw = not layers and name == "raw"
            layer = await _open_layer(storage, name, spec, roots, read_only=read_only)
        except BaseException:
            await storage.close()
            raise
        layers.append(layer)
        if spec.backing is None or (spec.backing == "header" and layer.backing is None):
            return probed_raw
        read_only = True
        if isinstance(spec.backing, ImageSpec):
            spec = spec.backing
            storage = await _open_storage(spec, roots, read_only=True)
        else:
            assert layer.backing is not None
            if layer.backing.format is None:
                raise ImageError(
                    layer.path,
                    "the header declares no format for it, and a backing format is never guessed",
                    field="backing file",
                    value=layer.backing.name,
                    hint=f"qemu-img rebase -u -F FORMAT -b {layer.backing.name} {layer.path}",
                )
            fd = _open_beneath(
                roots, layer.backing.name, layer.path, "backing file", seen, "the chain loops: it is a layer already"
            )
            path = str(Path(layer.path).parent / layer.backing.name)
            storage = await FileStorage.from_fd(fd, path, cache=spec.cache, force_share=spec.force_share)
            spec = ImageSpec(
                storage.path, layer.backing.format, read_only=True, cache=spec.cache, force_share=spec.force_share
            )


def _refuse_loop(storage: Storage, seen: dict[tuple[int, int], str], layers: list[FormatDriver]) -> None:
    if isinstance(storage, FileStorage):  # a header names files only, so no loop goes through a disk of an image
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


async def _open_layer(
    storage: Storage, name: str, spec: ImageSpec, roots: ImageRoots, *, read_only: bool
) -> FormatDriver:
    driver = driver_for(name, storage.path)
    options: dict[str, Any] = {"discard": spec.discard}
    if isinstance(spec.backing, ImageSpec):
        options["has_backing"] = True
    if name == "raw":
        options |= {"offset": spec.offset, "size": spec.size}
    elif spec.offset or spec.size is not None:
        raise ConfigError(f"{spec.path}: offset and size of a backing image need format raw, and this one is {name}")
    if spec.snapshot is not None:
        if not hasattr(driver, "data_file_name"):
            raise ConfigError(f"{spec.path}: {name} images have no internal snapshots (snapshot {spec.snapshot!r})")
        options["snapshot"] = spec.snapshot
    data_file: FileStorage | None = None
    if hasattr(driver, "data_file_name"):
        data_file = await _open_data_file(driver, storage, spec, roots, read_only=read_only)
        if data_file is not None:
            options["data_file_storage"] = data_file
    try:
        return await driver.open(storage, options, read_only=read_only)
    except BaseException:
        if data_file is not None:
            await data_file.close()
        raise


def _file_identity(storage: Storage) -> tuple[int, int]:
    """That of the file at the bottom."""
    while isinstance(storage, NodeStorage):
        storage = storage.node.top.storage
    assert isinstance(storage, FileStorage)
    return storage.identity


async def _open_data_file(
    driver: Any, storage: Storage, spec: ImageSpec, roots: ImageRoots, *, read_only: bool
) -> FileStorage | None:
    own, problem = (_file_identity(storage),), "it is the image itself"
    if spec.data_file is not None:
        data_file = await FileStorage.open(
            spec.data_file.path, read_only=read_only, cache=spec.cache, force_share=spec.force_share
        )
        if data_file.identity in own:
            await data_file.close()
            raise ImageError(storage.path, problem, field="data file", value=data_file.path)
        return data_file
    name = await driver.data_file_name(storage)
    if name is None:
        return None
    fd = _open_beneath(roots, name, storage.path, "data file", own, problem, os.O_RDONLY if read_only else os.O_RDWR)
    path = str(Path(storage.path).parent / name)
    return await FileStorage.from_fd(fd, path, cache=spec.cache, force_share=spec.force_share)


def _open_beneath(
    roots: ImageRoots,
    name: str,
    named_by: str,
    field: str,
    own: Collection[tuple[int, int]],
    problem: str,
    access: int = os.O_RDONLY,
) -> int:
    """The descriptor of the file a header names; ImageError with ``problem`` when it is one of ``own``.

    This is found before the file is locked: the lock would be refused, as if another process had the file.
    """
    fd = roots.open_beneath(name, relative_to=named_by, flags=access | os.O_CLOEXEC, field=field)
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) in own:
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
