"""The composition root: from a plan of what to serve to a running server, and down again.

Up: sockets are bound, images opened, exports made, then connections accepted; a failure undoes what was done.
Down (SIGTERM, SIGINT, SIGHUP, or the last client leaving): requests in flight finish, images are flushed and closed,
sockets removed. A second signal cuts the first part short.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from nbdserve import __version__
from nbdserve.bitmaps.bitmap import DirtyBitmap
from nbdserve.block.graph import image_roots
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from nbdserve.block.stored_bitmaps import open_with_bitmaps
from nbdserve.errors import ConfigError
from nbdserve.exports.export import Export, ExportTable
from nbdserve.logs import written_apart
from nbdserve.server.addresses import Address, UnixAddress
from nbdserve.server.listeners import Listener, bind_all
from nbdserve.server.server import Server, ServerLimits

if TYPE_CHECKING:
    from nbdserve.admin.control import Control
    from nbdserve.admin.start import Admin

    # pydantic is 12 MiB and a third of the start-up time; nbdserve-qemu-nbd does without.
    from nbdserve.config.models import Config, ServerOptions

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export to be made."""

    name: str
    image: ImageSpec
    description: str = ""
    allocation_depth: bool = False
    max_connections: int = 0
    """Clients at a time; 0: any number."""
    bitmaps: Sequence[str] = ()
    """Names of dirty bitmaps stored in the images of the chain, to be shown to clients."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to serve, and where. ``listeners`` are sockets that exist already; without any, ``addresses`` are bound."""

    exports: Sequence[ExportPlan]
    addresses: Sequence[Address] = ()
    listeners: Sequence[Listener] = ()
    limits: ServerLimits = field(default_factory=ServerLimits)
    default_export: str | None = ""
    """The export found under the empty name; empty: the first one; None: only one whose name is empty."""
    image_roots: Sequence[str] = ()
    exit_last: bool = False
    """End when the last client that was in transmission has left."""
    drain_seconds: float = 10.0
    pid_file: str = ""
    admin: Sequence[Address] = ()
    """Where the admin socket is; without any there is none, and nothing of it is loaded."""
    admin_roots: Sequence[str] = ()
    """Directories below which admin clients may name secrets and sockets, besides those of the server's sockets."""


def plan_of(
    server: ServerOptions,
    exports: Sequence[ExportPlan],
    listeners: Sequence[Listener] = (),
    admin: Sequence[Address] = (),
    admin_roots: Sequence[str] = (),
) -> Plan:
    """The plan for ``exports`` with the server's options."""
    return Plan(
        exports,
        server.addresses(),
        listeners,
        ServerLimits(server.handshake_seconds, server.max_handshakes, server.max_clients, server.request_memory),
        server.default_export,
        server.image_roots,
        server.exit_last,
        server.drain_seconds,
        server.pid_file,
        admin,
        admin_roots,
    )


def exports_of(config: Config) -> list[ExportPlan]:
    """The exports a configuration file asks for; ConfigError names the one with a mistake."""
    plans = []
    for name, options in config.exports.items():
        try:
            image = options.image()
        except ConfigError as error:
            raise ConfigError(f"[exports.{name}] {error}") from None
        plans.append(
            ExportPlan(
                name,
                image,
                options.description,
                options.allocation_depth,
                options.max_connections,
                tuple(options.bitmaps),
            )
        )
    return plans


def run(plan: Plan, ready: Callable[[list[Address]], None]) -> int:
    """Serve until told to stop; the exit code.

    ``ready`` is called once clients can connect, with the addresses they can use. Raises ConfigError, ImageError or
    OSError when the server cannot start, or when closing an image failed, that is, when data may be lost.
    """
    with written_apart(), asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(plan, ready))
    return 0


async def serve(plan: Plan, ready: Callable[[list[Address]], None]) -> None:
    """``run`` inside a running event loop."""
    stopping = Stopping(asyncio.get_running_loop())
    listeners = list(plan.listeners) or bind_all(plan.addresses)
    nodes: list[Node] = []
    admin: Admin | None = None
    control: Control | None = None
    try:
        if plan.admin:
            admin = import_module("nbdserve.admin.start").Admin(plan.admin)
        exports = ExportTable()
        for export in plan.exports:
            roots = image_roots(export.image.path, [Path(root) for root in plan.image_roots])
            node, bitmaps = await open_with_bitmaps(export.image, roots, export.bitmaps)
            nodes.append(node)
            exports.add(_export(export, node, bitmaps))
        _choose_default(exports, plan.default_export)
        on_last_client = stopping.stop if plan.exit_last else lambda: None
        server = Server(exports, plan.limits, on_last_client=on_last_client)
        try:
            for listener in listeners:
                await server.listen(listener.sock)
            if admin is not None:
                control = _control(plan, stopping, server)
                await admin.start(control)
            _write_pid_file(plan.pid_file)
            ready([listener.address for listener in listeners])
            await stopping.first
        finally:
            if control is not None:
                await control.begin_end()
            await _drain(server, plan.drain_seconds, stopping)
            if admin is not None:
                await admin.close()
            if control is not None:
                await control.close()
    finally:
        if admin is not None:
            admin.release()
        for listener in listeners:
            listener.close()
        await _close(nodes)


def _control(plan: Plan, stopping: Stopping, server: Server) -> Control:
    """What the clients of the admin socket act on."""
    package = f"nbdserve {__version__}"
    control: Control = import_module("nbdserve.admin.control").Control(package, stopping.stop, server)
    control.read_secret = import_module("nbdserve.config.secrets").secret_of_object
    exports = zip(server.exports, (export.image.cache for export in plan.exports), strict=True)
    sockets = [address.path for address in (*plan.admin, *plan.addresses) if isinstance(address, UnixAddress)]
    private_roots = [*plan.admin_roots, *(str(Path(path).parent) for path in sockets if not path.startswith("@"))]
    listening = bool(plan.listeners or plan.addresses)
    control.adopt(exports, plan.image_roots, private_roots=private_roots, listening=listening)
    return control


class Stopping:
    """Requests to stop: ``first`` is done at the first one, ``second`` (now, please) at the second signal."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first: asyncio.Future[None] = loop.create_future()
        self.second: asyncio.Future[None] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)

    def stop(self) -> None:
        """Stop as the first signal does."""
        if not self.first.done():
            self.first.set_result(None)

    def _on_signal(self) -> None:
        if not self.first.done():
            self.stop()
        elif not self.second.done():
            self.second.set_result(None)


def _export(plan: ExportPlan, node: Node, bitmaps: Sequence[DirtyBitmap]) -> Export:
    return Export(
        plan.name,
        node,
        description=plan.description,
        read_only=plan.image.read_only,
        allocation_depth=plan.allocation_depth,
        max_connections=plan.max_connections,
        bitmaps=bitmaps,
    )


def _choose_default(exports: ExportTable, name: str | None) -> None:
    if name and exports.find(name) is None:
        raise ConfigError(f"default export {name!r}: there is no export of that name")
    if name != "":
        exports.default = name


async def _drain(server: Server, seconds: float, stopping: Stopping) -> None:
    """Stop the server within ``seconds``, or at once when told a second time."""
    drained = asyncio.ensure_future(server.stop(seconds))
    await asyncio.wait({drained, stopping.second}, return_when=asyncio.FIRST_COMPLETED)
    if not drained.done():
        drained.cancel()
        await asyncio.wait({drained})
        await server.stop(0)


async def _close(nodes: Sequence[Node]) -> None:
    """Flush and close every image; the first failure is raised after all of them are closed."""
    results = await asyncio.gather(*(node.close() for node in nodes), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def _write_pid_file(path: str) -> None:
    if path:
        try:
            Path(path).write_text(f"{os.getpid()}\n")
        except OSError as error:
            raise ConfigError(f"cannot write the pid file {path}: {error.strerror}") from error
