"""Figures to a table and to JSON."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.perf.cases import Case
from tests.perf.servers import CEILING

OURS = "nbdserve"


@dataclass(slots=True)
class Figures:
    """Every round of one server on one case."""

    values: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_rss_mib: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(slots=True)
class Result:
    """One case: figures by server name."""

    case: Case
    servers: dict[str, Figures]

    def ratio(self, peer: str) -> float | None:
        """Median of ours over median of the peer's; None unless both ran."""
        if OURS not in self.servers or peer not in self.servers:
            return None
        return self.servers[OURS].median / self.servers[peer].median

    def floor(self, peer: str) -> float | None:
        return self.case.floor.qemu_nbd if peer == "qemu-nbd" else self.case.floor.nbdkit

    def passed(self, peer: str) -> bool | None:
        """Whether the ratio reaches its floor; None where there is nothing to compare."""
        ratio, floor = self.ratio(peer), self.floor(peer)
        if ratio is None or floor is None:
            return None
        return ratio <= floor if self.case.lower_is_better else ratio >= floor

    def as_json(self) -> dict[str, Any]:
        return {
            "case": self.case.name,
            "unit": self.case.unit,
            "servers": {
                name: {
                    "median": figures.median,
                    "values": figures.values,
                    "cpu_seconds": figures.cpu_seconds,
                    "peak_rss_mib": figures.peak_rss_mib,
                }
                for name, figures in self.servers.items()
            },
            "ratios": {
                peer: {"ratio": self.ratio(peer), "floor": self.floor(peer), "passed": self.passed(peer)}
                for peer in ("qemu-nbd", "nbdkit")
            },
        }


def print_table(console: Console, results: list[Result], title: str) -> None:
    """Medians of the servers, the two ratios with their floors, and the largest RSS of ours."""
    table = Table(title=title)
    for heading in ("case", "unit"):
        table.add_column(heading, no_wrap=True)
    names = [OURS, "qemu-nbd", "nbdkit"]
    if any(CEILING in result.servers for result in results):
        names.append(CEILING)
    for heading in (*names, "/ qemu-nbd", "floor", "/ nbdkit", "floor", "RSS MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        ours = result.servers.get(OURS)
        table.add_row(
            result.case.name,
            result.case.unit,
            *(_figure(result, name) for name in names),
            *_ratio(result, "qemu-nbd"),
            *_ratio(result, "nbdkit"),
            f"{ours.peak_rss_mib:.0f}" if ours else "",
        )
    console.print(table)


def save(path: Path, results: list[Result], settings: dict[str, Any]) -> None:
    """Everything measured, with what it was measured on."""
    machine = {"kernel": platform.release(), "python": platform.python_version(), "cpu": platform.machine()}
    document = {"machine": machine, "settings": settings, "results": [result.as_json() for result in results]}
    path.write_text(json.dumps(document, indent=1) + "\n")


def _figure(result: Result, name: str) -> str:
    figures = result.servers.get(name)
    if figures is None:
        return ""
    return f"{figures.median:.2f}" if result.case.unit == "s" else f"{figures.median:,.0f}"


def _ratio(result: Result, peer: str) -> tuple[str, str]:
    ratio, floor, passed = result.ratio(peer), result.floor(peer), result.passed(peer)
    bound = "" if floor is None else f"{'<=' if result.case.lower_is_better else '>='} {floor:g}"
    if ratio is None:
        return "", bound
    colour = {True: "green", False: "red", None: "default"}[passed]
    word = {True: "", False: " FAIL", None: ""}[passed]
    return f"[{colour}]{ratio:.2f}{word}[/]", bound
