"""``nbdserve admin status``: exports, clients, jobs and throughput at a glance."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Final

import typer
from rich.box import SIMPLE
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from nbdserve.cli.admin.client import AdminClient, address_or_default
from nbdserve.cli.output import Output, OutputOption, print_json
from nbdserve.units import format_size

VERB: Final = "__org.nbdserve_status"


def status(
    ctx: typer.Context,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Draw it again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option("--interval", "-i", min=0.1, help="Seconds in between.")] = 1.0,
    output: OutputOption = Output.HUMAN,
) -> int:
    """Exports, clients, jobs and throughput at a glance."""
    with AdminClient(address_or_default(ctx.obj)) as client:
        if output is Output.JSON:
            while True:
                print_json(client.execute(VERB))
                if not watch:
                    return 0
                time.sleep(interval)
        if not watch:
            glance(client, interval)
            return 0
        before = client.execute(VERB)
        with Live(picture(before, before), console=Console(highlight=False), auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                now = client.execute(VERB)
                live.update(picture(before, now), refresh=True)
                before = now


def glance(client: AdminClient, interval: float = 1.0) -> None:
    """Print it, with the rates of half a second, or ``interval``."""
    before = client.execute(VERB)
    time.sleep(min(interval, 0.5))
    Console(highlight=False).print(picture(before, client.execute(VERB)))


def picture(before: Mapping[str, Any], now: Mapping[str, Any]) -> RenderableType:
    """The tables, with the rates between two answers."""
    seconds = max(now["uptime"] - before["uptime"], 1e-6)
    rates = [
        f"{name} {format_size(round((now['io'][key] - before['io'][key]) / seconds))}/s"
        for name, key in (("read", "read-bytes"), ("written", "written-bytes"))
    ]
    busy = 100 * (now["cpu-seconds"] - before["cpu-seconds"]) / seconds
    head = f"{now['version']}, up {_duration(now['uptime'])}, {now['status']}; {', '.join(rates)}; CPU {busy:.0f} %"
    parts: list[RenderableType] = [Text(head), _exports(before, now, seconds)]
    if now["clients"]:
        parts.append(_clients(now))
    if now["jobs"]:
        parts.append(_jobs(now))
    return Group(*parts)


def _exports(before: Mapping[str, Any], now: Mapping[str, Any], seconds: float) -> Table:
    table = Table("export", "node", "size", "access", "clients", "changes/s", box=SIMPLE)
    changes = {export["id"]: export["changes"] for export in before["exports"]}
    for export in now["exports"]:
        rate = (export["changes"] - changes.get(export["id"], export["changes"])) / seconds
        table.add_row(
            Text(export["name"]),
            Text(export["node-name"]),
            format_size(export["size"]),
            "read-only" if export["read-only"] else "writable",
            str(export["connections"]),
            f"{rate:.0f}",
        )
    return table


def _clients(now: Mapping[str, Any]) -> Table:
    table = Table("client", "export", box=SIMPLE)
    for client in now["clients"]:
        table.add_row(Text(client["peer"]), Text(client["export"]))
    return table


def _jobs(now: Mapping[str, Any]) -> Table:
    table = Table("job", "type", "status", "progress", box=SIMPLE)
    for job in now["jobs"]:
        total = job["total-progress"]
        done = 100 * job["current-progress"] / total if total else 0
        table.add_row(Text(job["id"]), job["type"], Text(job.get("error", job["status"])), f"{done:.0f} %")
    return table


def _duration(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02}"
