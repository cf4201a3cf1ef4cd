"""Jobs on the layers of a disk that is in use: commit and stream."""

from __future__ import annotations

from typing import Any, Final, Literal, TypeAlias

from nbdserve.admin.backing import take_in
from nbdserve.admin.command import Command
from nbdserve.admin.control import Control
from nbdserve.admin.errors import DEVICE_NOT_FOUND, QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.admin.schema import Arguments, Int
from nbdserve.formats.base import BackingReference
from nbdserve.jobs.commit import ActiveCommit, Commit
from nbdserve.jobs.job import Job
from nbdserve.jobs.stream import Stream

OnError: TypeAlias = Literal["report", "ignore", "enospc", "stop", "auto"]
_COMMON = {"speed", "auto_finalize", "auto_dismiss"}


class Committing(Arguments):
    """Of ``block-commit``."""

    job_id: str | None = None
    device: str
    base_node: str | None = None
    base: str | None = None
    top_node: str | None = None
    top: str | None = None
    backing_file: str | None = None
    speed: Int = 0
    on_error: OnError = "report"
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


class Streaming(Arguments):
    """Of ``block-stream``."""

    job_id: str | None = None
    device: str
    base: str | None = None
    base_node: str | None = None
    backing_file: str | None = None
    bottom: str | None = None
    speed: Int = 0
    on_error: OnError = "report"
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True


async def block_commit(control: Control, arguments: Committing) -> None:
    """Write what upper layers hold into one below them."""
    entry = control.nodes.find(arguments.device)
    if entry is None:
        raise QmpError(f"Device '{arguments.device}' not found", DEVICE_NOT_FOUND)
    layers = entry.node.layers
    if len(layers) < 2:
        raise QmpError("cannot commit an image into itself")
    top = _layer(control, entry, arguments.top_node, arguments.top, "top", 0)
    base = _layer(control, entry, arguments.base_node, arguments.base, "base", len(layers) - 1)
    if base <= top:
        raise QmpError("'top' and 'base' are not in the order of the chain")
    identity = control.jobs.new_id(arguments.job_id, entry)
    await take_in(control.nodes, entry, base)
    if entry.node.layers != layers:
        raise QmpError(f"Node '{entry.name}' has got other layers meanwhile: try again")
    job: Job
    if top == 0:
        if arguments.backing_file is not None:
            raise QmpError("Cannot specify 'backing-file' when the active layer is the top")
        errors = {"on_source_error": arguments.on_error, "on_target_error": arguments.on_error}
        job = ActiveCommit(identity, entry.node, base, **errors, **job_options(arguments))
    else:
        backing = _reference(arguments.backing_file, layers[base].name)
        job = Commit(
            identity, entry.node, top, base, backing=backing, on_error=arguments.on_error, **job_options(arguments)
        )
    control.jobs.add(job, entry)
    job.start()


async def block_stream(control: Control, arguments: Streaming) -> None:
    """Copy what lower layers hold into the top one, which then does without them."""
    entry = control.nodes.either(arguments.device)
    layers = entry.node.layers
    if arguments.bottom is not None and (arguments.base is not None or arguments.base_node is not None):
        raise QmpError("'bottom' cannot be specified together with 'base' or 'base-node'")
    if arguments.bottom is not None:
        base = _layer(control, entry, arguments.bottom, None, "bottom", 0) + 1
    else:
        base = _layer(control, entry, arguments.base_node, arguments.base, "base", len(layers))
    if base == 0:
        raise QmpError("the base of a stream must be below the top layer")
    if base == len(layers) and arguments.backing_file is not None:
        raise QmpError("backing file specified, but streaming the entire chain")
    backing = None if base == len(layers) else _reference(arguments.backing_file, layers[base].name)
    job = Stream(
        control.jobs.new_id(arguments.job_id, entry),
        entry.node,
        base if base < len(layers) else None,
        backing=backing,
        on_error=arguments.on_error,
        **job_options(arguments),
    )
    control.jobs.add(job, entry)
    job.start()


def job_options(arguments: Arguments) -> dict[str, Any]:
    """Those that every job takes, whose arguments are called the same."""
    return {name: getattr(arguments, name) for name in _COMMON}


def _layer(control: Control, entry: NodeEntry, node_name: str | None, path: str | None, what: str, default: int) -> int:
    """The layer of the chain that is meant by its node's name, or by its file."""
    if node_name is not None and path is not None:
        raise QmpError(f"'{what}' and '{what}-node' cannot be specified at the same time")
    if node_name is not None:
        index = entry.index_of(*control.nodes.layer(node_name))
        if index is None:
            raise QmpError(f"'{node_name}' is not in this backing file chain")
        return index
    if path is not None:
        for index, layer in enumerate(entry.node.layers):
            if path in (layer.path, None if index == 0 else _named(entry, index)):
                return index
        raise QmpError(f"Can't find '{path}' in the backing chain")
    return default


def _named(entry: NodeEntry, index: int) -> str | None:
    """How the layer above names layer ``index``."""
    backing = entry.node.layers[index - 1].backing
    return None if backing is None else backing.name


def _reference(name: str | None, format_name: str) -> BackingReference | None:
    return None if name is None else BackingReference(name, format_name)


COMMANDS: Final = (
    Command("block-commit", block_commit, Committing),
    Command("block-stream", block_stream, Streaming),
)
