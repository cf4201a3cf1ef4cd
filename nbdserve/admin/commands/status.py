"""``__org.nbdserve_status``: what the server does, in one answer."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from nbdserve.admin.command import Command
from nbdserve.admin.commands.jobs import JobInfo, query_jobs
from nbdserve.admin.control import Control
from nbdserve.admin.schema import Nothing, Result


class ExportStatus(Result):
    """An export; ``changes`` counts completed writes, and what else changes the disk, since it was opened."""

    id: str
    name: str
    node_name: str
    size: int
    read_only: bool
    connections: int
    changes: int


class ClientStatus(Result):
    """A client in transmission."""

    peer: str
    export: str


class IoStatus(Result):
    """Bytes that read and write system calls of the process have moved (proc(5), ``/proc/pid/io``)."""

    read_bytes: int
    written_bytes: int


class ServerStatus(Result):
    """All of it; seconds since the start, and of processor time."""

    version: str
    status: str
    uptime: float
    cpu_seconds: float
    io: IoStatus
    exports: list[ExportStatus]
    clients: list[ClientStatus]
    jobs: list[JobInfo]


async def status(control: Control, arguments: Nothing) -> ServerStatus:
    """The server at this moment."""
    times = os.times()
    return ServerStatus(
        version=control.package,
        status="running" if control.quiesced is None else "paused",
        uptime=time.monotonic() - control.started,
        cpu_seconds=times.user + times.system,
        io=_io(),
        exports=[
            ExportStatus(
                id=export.id,
                name=export.export.name,
                node_name=export.entry.name,
                size=export.export.size,
                read_only=export.export.read_only,
                connections=export.export.connections,
                changes=export.entry.node.changes,
            )
            for export in control.exports
        ],
        clients=[ClientStatus(peer=peer, export=name) for peer, name in control.server.clients()],
        jobs=await query_jobs(control, arguments),
    )


def _io() -> IoStatus:
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux's, or not readable here
        lines = []
    values = {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
    return IoStatus(read_bytes=values.get("rchar", 0), written_bytes=values.get("wchar", 0))


COMMANDS: Final = (Command("__org.nbdserve_status", status, returns=ServerStatus),)
"""Verbs of our own have this prefix, as the protocol asks of those that QEMU does not have."""
