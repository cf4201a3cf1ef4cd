"""Opening layers again: for writing or not any more, in the place of the one there is; or once more, beside it."""

from __future__ import annotations

import contextlib
import os
from contextlib import AsyncExitStack

from nbdserve.block.drain import uninterrupted
from nbdserve.block.graph import Origin, open_layer
from nbdserve.block.node import Node
from nbdserve.errors import ImageError, RequestError
from nbdserve.formats.base import FormatDriver
from nbdserve.storage.file import FileStorage


async def reopen(node: Node, index: int, *, read_only: bool) -> FormatDriver:
    """Open ``node.layers[index]`` again, for writing or not, in the place of the one there is; inside ``drained``.

    The file is the same one, whatever its name has become; it is unlocked in between. ImageError, with the layer as it
    was, when it cannot be: another process uses it, or the file may not be written. What closing the old one raises
    (OSError, RequestError) is raised when the new one has taken its place; so is that the caller was cancelled.
    """
    return await uninterrupted(_reopen(node, index, read_only=read_only))


async def _reopen(node: Node, index: int, *, read_only: bool) -> FormatDriver:
    old = node.layers[index]
    origin, storage = _place_of(old)
    file_node = origin.spec.file_node
    if file_node is not None and file_node.read_only and not read_only:
        raise ImageError(old.path, "cannot be opened for writing: the node of its file is read-only")
    try:
        fds = [storage.descriptor(read_only=mode) for mode in (read_only, storage.read_only)]
    except OSError as error:
        raise ImageError(old.path, f"cannot be opened again: {error.strerror}") from error
    failure: OSError | RequestError | None = None
    try:
        try:
            await old.close()
        except (OSError, RequestError) as error:  # closed it is nevertheless, and clients go on reading
            failure = error
        try:
            new = await _open_fd(fds.pop(0), old, origin, read_only=read_only)
        except Exception:
            await _replace(node, index, await _open_fd(fds.pop(0), old, origin, read_only=old.read_only))
            raise
    finally:
        for fd in fds:
            os.close(fd)
    await _replace(node, index, new)
    if failure is not None:
        raise failure
    return new


async def open_again(layer: FormatDriver) -> FormatDriver:
    """The image of ``layer``, which is read-only, once more, under the locks it has. ImageError, OSError."""
    if not layer.read_only:
        raise ImageError(layer.path, "is in use: it may be written meanwhile")
    origin, storage = _place_of(layer)
    return await _open_on(await storage.share(cache=origin.spec.cache), layer, origin, read_only=True)


def _place_of(layer: FormatDriver) -> tuple[Origin, FileStorage]:
    if isinstance(layer.origin, Origin) and isinstance(layer.storage, FileStorage):
        return layer.origin, layer.storage
    raise ImageError(layer.path, "the image is part of another and cannot be opened again")


async def close_to_writing(node: Node, index: int) -> None:
    """``reopen`` read-only a layer that nobody writes any more, and whose data was flushed; inside ``drained``.

    If that fails it stays open for writing. If closing it does, it is not marked as closed cleanly, or has leaks.
    """
    with contextlib.suppress(ImageError, RequestError, OSError):
        await reopen(node, index, read_only=True)


async def _open_fd(fd: int, old: FormatDriver, origin: Origin, *, read_only: bool) -> FormatDriver:
    spec = origin.spec
    storage = await FileStorage.from_fd(
        fd, old.path, cache=spec.cache, locking=spec.file_node is None, force_share=spec.force_share
    )
    return await _open_on(storage, old, origin, read_only=read_only)


async def _open_on(storage: FileStorage, old: FormatDriver, origin: Origin, *, read_only: bool) -> FormatDriver:
    async with AsyncExitStack() as files:
        files.push_async_callback(storage.close)
        layer = await open_layer(storage, old.name, origin.spec, origin.roots, files, read_only=read_only)
        files.pop_all()
    return layer


async def _replace(node: Node, index: int, layer: FormatDriver) -> None:
    layers = list(node.layers)
    if index + 1 < len(layers):
        layer.accept_backing(layers[index + 1])
    old, layers[index] = layers[index], layer
    node.replace_layers(layers)
    if node.tell_reopened is not None:
        node.tell_reopened(old, layer)
