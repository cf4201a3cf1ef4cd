"""From ``BlockdevOptions`` to an open node."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Final

from nbdserve.admin.backing import check_backing, know_backing, open_below
from nbdserve.admin.blockdev import (
    BlockdevOptions,
    CopyBeforeWriteOptions,
    FileOptions,
    ImageOptions,
    LuksOptions,
    NbdOptions,
    NodeOptions,
    NullOptions,
    RawOptions,
    SnapshotAccessOptions,
    ThrottleOptions,
    UnixServer,
)
from nbdserve.admin.errors import QmpError, description_of
from nbdserve.admin.moments import Moment
from nbdserve.admin.nodes import NodeEntry, NodeTable
from nbdserve.admin.objects import ObjectTable, ThrottleGroupEntry
from nbdserve.admin.paths import PathPolicy
from nbdserve.block.filters.snapshot_access import snapshot_access
from nbdserve.block.filters.throttle import ThrottledNode
from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import BackingSpec, ImageSpec
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.file import FileStorage
from nbdserve.storage.nbd_target import NbdTarget, parse_port
from nbdserve.storage.null import NullStorage
from nbdserve.units import SECTOR_SIZE, align_up

_CACHE_MODES: Final = {(False, False): "writeback", (True, False): "none", (False, True): "unsafe"}


@dataclass
class Opener:
    """Opens nodes from options, which may refer to ``objects``."""

    nodes: NodeTable
    paths: PathPolicy
    objects: ObjectTable = field(default_factory=ObjectTable)

    async def open(self, options: BlockdevOptions) -> NodeEntry:
        """A new entry, in the table. QmpError, and nothing stays open, when it cannot be made."""
        name = options.node_name
        if name is None:
            raise QmpError("'node-name' must be specified for the root node")
        self.nodes.check_name(name)
        if isinstance(options, CopyBeforeWriteOptions | SnapshotAccessOptions):
            return await self._filter(name, options)
        if isinstance(options, ThrottleOptions) and isinstance(options.file, str):
            return self._throttle(name, options, self.nodes.either(options.file))
        described = options.file if isinstance(options, ThrottleOptions) else options
        assert not isinstance(described, str)
        made = _Making(self)
        try:
            async with AsyncExitStack() as opened:
                made.opened = opened
                node = await made.node(described)
                opened.push_async_callback(node.close)
                if made.foundation is not None:
                    below = await open_below(node.layers[-1], made.foundation)
                    know_backing(node.layers[-1], below[0])
                    async with node.drained():
                        node.replace_layers([*node.layers, *below])
                entry = NodeEntry(name, options.driver, node, cache_mode(options), children=made.children)
                if isinstance(options, ThrottleOptions):
                    group = self._group(options)
                    entry.node, entry.inner = ThrottledNode(node, group.throttle, owned=True), node
                    entry.objects.append(group)
                made.name_parts(entry)
                self.nodes.add(entry)
                opened.pop_all()
        except (ImageError, ConfigError, OSError) as error:
            raise QmpError(description_of(error)) from error
        entry.announce()
        if made.foundation is not None:
            entry.stand_on([made.foundation], entry.layers[-len(made.foundation.layers)])
        return entry

    def _throttle(self, name: str, options: ThrottleOptions, below: NodeEntry) -> NodeEntry:
        group = self._group(options)
        node = ThrottledNode(below.node, group.throttle)
        entry = NodeEntry(name, options.driver, node, below.cache, children=[below], is_filter=True, objects=[group])
        self.nodes.add(entry)
        entry.announce()
        return entry

    def _group(self, options: ThrottleOptions) -> ThrottleGroupEntry:
        group = self.objects.find(options.throttle_group)
        if not isinstance(group, ThrottleGroupEntry):
            raise QmpError(f"Throttle group '{options.throttle_group}' does not exist")
        return group

    async def _filter(self, name: str, options: CopyBeforeWriteOptions | SnapshotAccessOptions) -> NodeEntry:
        below = self.nodes.either(options.file)
        if isinstance(options, SnapshotAccessOptions):
            if below.moment is None:
                raise QmpError(f"Node '{below.name}' keeps no moment: give a 'copy-before-write' node")
            node = snapshot_access(below.moment, below.node.path)
            entry = NodeEntry(name, options.driver, node, children=[below], is_filter=True)
        else:
            entry = await self._keep(name, options, below)
        self.nodes.add(entry)
        entry.announce()
        return entry

    async def _keep(self, name: str, options: CopyBeforeWriteOptions, below: NodeEntry) -> NodeEntry:
        target = self.nodes.either(options.target)
        if target.users:
            raise QmpError(f"Node '{target.name}' is in use by {target.users[0]}")
        if target.node.read_only or target.is_made_of(below):
            raise QmpError(f"Node '{target.name}' cannot be written")
        if target.node.size != below.node.size:
            raise QmpError("Source and target image have different sizes")
        if options.bitmap is not None:
            self.nodes.either(options.bitmap.node).node.bitmaps.get(options.bitmap.name)
        async with below.node.drained():
            breaks = options.on_cbw_error == "break-snapshot"
            moment = Moment(below.node, target.node, breaks=breaks, timeout=options.cbw_timeout)
        return NodeEntry(
            name, options.driver, below.node, below.cache, children=[below, target], is_filter=True, moment=moment
        )


class _Making:
    """One node in the making: the nodes it refers to, and the names its parts are to have."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self.children: list[NodeEntry] = []
        self.foundation: NodeEntry | None = None
        """The node that is to be below all of its layers."""
        self.opened = AsyncExitStack()
        self._layer_names: list[str | None] = []
        self._file_names: list[str | None] = []

    async def node(self, options: BlockdevOptions) -> Node:
        """The node the options ask for."""
        if isinstance(options, NullOptions):
            # QEMU counts disks in sectors.
            storage = NullStorage(align_up(options.size, SECTOR_SIZE), read_only=options.read_only)
            return Node([await RawDriver.open(storage, {}, read_only=options.read_only)])
        spec = await self._spec(options)
        return await open_image(spec, await asyncio.to_thread(self._opener.paths.image_roots))

    def name_parts(self, entry: NodeEntry) -> None:
        """Give the parts of the chain the names the options have for them."""
        for layer, layer_name, file_name in zip(entry.layers, self._layer_names, self._file_names, strict=False):
            if file_name is not None:
                entry.inner_names[file_name] = layer.storage
            if layer_name is not None and layer is not entry.node.top:
                entry.inner_names[layer_name] = layer

    async def _spec(self, options: BlockdevOptions, *, read_only: bool = False) -> ImageSpec:
        generic = _generic(options)
        generic["read_only"] |= read_only
        self._layer_names.append(options.node_name)
        if isinstance(options, FileOptions):
            self._file_names.append(None)
            return await self._file(options, ImageSpec("", "raw", **generic))
        if isinstance(options, NbdOptions):
            self._file_names.append(None)
            return _nbd(options, ImageSpec("", "raw", **generic))
        if isinstance(options, NullOptions | CopyBeforeWriteOptions | SnapshotAccessOptions | ThrottleOptions):
            raise QmpError(f"driver '{options.driver}' holds no image")
        spec = await self._below(options.file, ImageSpec("", options.driver, **generic))
        if isinstance(options, RawOptions):
            return replace(spec, offset=options.offset or 0, size=options.size)
        if isinstance(options, LuksOptions):
            return replace(spec, secret=self._secret(options.key_secret))
        if options.encrypt is not None:
            spec = replace(spec, secret=self._secret(options.encrypt.key_secret, "encrypt."))
        if options.data_file is not None:
            spec = replace(spec, data_file=await self._data_file(options.data_file, read_only=spec.read_only))
        if "backing" in options.model_fields_set:
            backing = await self._backing(options.backing)
            spec = replace(spec, backing=backing, gets_backing=self.foundation is not None and backing is None)
        return spec

    async def _backing(self, given: object) -> BackingSpec:
        if given is None:
            return None
        if isinstance(given, str):
            try:
                self.foundation = self._opener.nodes.either(given)
                check_backing(self.foundation, given)
            except QmpError as error:
                raise QmpError(f"Could not open backing file: {error}") from None
            return None
        assert isinstance(given, FileOptions | NullOptions | NbdOptions | RawOptions | LuksOptions | ImageOptions)
        return await self._spec(given, read_only=True)

    async def _data_file(self, given: object, *, read_only: bool) -> ImageSpec:
        if not isinstance(given, FileOptions):
            raise QmpError("'data-file': give the options of a 'file' or 'host_device' node here")
        spec = ImageSpec("", "raw", **_generic(given))
        return await self._file(given, replace(spec, read_only=spec.read_only or read_only))

    async def _below(self, given: object, spec: ImageSpec) -> ImageSpec:
        """``spec`` with what holds the image's bytes."""
        if isinstance(given, FileOptions):
            self._file_names.append(given.node_name)
            return await self._file(given, spec)
        if isinstance(given, str):
            self._file_names.append(None)
            return await self._reference(given, spec)
        if isinstance(given, NbdOptions):
            self._file_names.append(given.node_name)
            return _nbd(given, spec)
        if isinstance(given, NullOptions | CopyBeforeWriteOptions | SnapshotAccessOptions | ThrottleOptions):
            raise QmpError(f"'file': driver '{given.driver}' holds no image")
        assert isinstance(given, RawOptions | ImageOptions | LuksOptions)
        self._file_names.append(given.node_name)
        inner = _Making(self._opener)
        inner.opened = self.opened
        below = await inner._spec(given, read_only=spec.read_only)
        if inner.foundation is not None:
            raise QmpError(f"Node '{inner.foundation.name}' cannot be below an image that holds another one")
        self.children += inner.children
        return replace(spec, path=below.path, file=below)

    async def _file(self, given: FileOptions, spec: ImageSpec) -> ImageSpec:
        if given.locking == "off":
            raise QmpError("'locking': images are always locked, leave it out")
        mode = cache_mode(given) if given.cache is not None else spec.cache
        read_only = spec.read_only or given.read_only
        storage = await self._opener.paths.open(
            given.filename, read_only=read_only, cache=mode, force_share=spec.force_share
        )
        self.opened.push_async_callback(storage.close)
        if given.driver == "host_device" and not storage.is_device:
            raise QmpError(f"'host_device' driver requires '{given.filename}' to be a block device")
        return replace(spec, path=storage.path, opened=storage, cache=mode, read_only=read_only)

    async def _reference(self, name: str, spec: ImageSpec) -> ImageSpec:
        """The bytes of a node that is there: a file's, under the locks it holds."""
        entry = self._opener.nodes.either(name)
        storage = entry.node.top.storage
        if entry.driver not in ("file", "host_device") or not isinstance(storage, FileStorage):
            raise QmpError(f"Node '{name}' is no file: driver '{entry.driver}' cannot hold an image here")
        if entry.users and not spec.read_only:
            raise QmpError(f"Node '{name}' is in use by {entry.users[0]}")
        self.children.append(entry)
        shared = await storage.share(cache=entry.cache)
        self.opened.push_async_callback(shared.close)
        return replace(
            spec,
            path=storage.path,
            opened=shared,
            file_node=entry.node,
            read_only=spec.read_only or storage.read_only,
            cache=entry.cache,
        )

    def _secret(self, name: str | None, where: str = "") -> bytes:
        if name is None:
            raise QmpError(f"Parameter '{where}key-secret' is missing")
        secret = self._opener.objects.secrets.get(name)
        if secret is None:
            raise QmpError(f"No secret with id '{name}'")
        return secret


def _generic(options: NodeOptions) -> dict[str, Any]:
    if options.detect_zeroes == "unmap" and options.discard != "unmap":
        raise QmpError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
    return {
        "read_only": options.read_only,
        "discard": options.discard,
        "detect_zeroes": options.detect_zeroes,
        "cache": cache_mode(options),
        "force_share": options.force_share,
    }


def _nbd(given: NbdOptions, spec: ImageSpec) -> ImageSpec:
    if isinstance(given.server, UnixServer):
        target = NbdTarget(given.export, socket=given.server.path)
    else:
        target = NbdTarget(given.export, given.server.host, parse_port(given.server.port))
    target = replace(target, reconnect_delay=given.reconnect_delay, open_timeout=given.open_timeout)
    return replace(spec, path=target.uri, nbd=target, read_only=spec.read_only or given.read_only)


def cache_mode(options: NodeOptions) -> str:
    """The name of the cache mode that is asked for. QmpError when there is none."""
    if options.cache is None:
        return "writeback"
    mode = _CACHE_MODES.get((options.cache.direct, options.cache.no_flush))
    if mode is None:
        raise QmpError("'cache': direct and no-flush do not go together")
    return mode
