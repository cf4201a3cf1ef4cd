"""The clients: fio's nbd engine and nbdcopy, each run once against a URI."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any

from tests.perf.cases import Case

FIRST_WRITES = 4096
"""Requests of a first-write run: a quarter of the clusters of a 1 GiB disk, so that most of them still allocate."""


def measure(case: Case, uri: str, size: int, seconds: float) -> float:
    """The case's figure, in its unit."""
    if case.pattern == "nbdcopy":
        return _nbdcopy(uri)
    return _fio(case, uri, size, seconds)


def _nbdcopy(uri: str) -> float:
    start = time.perf_counter()
    _run(["nbdcopy", uri, "null:"])
    return time.perf_counter() - start


def _fio(case: Case, uri: str, size: int, seconds: float) -> float:
    argv = [
        *("fio", "--name=perf", "--ioengine=nbd", f"--uri={uri}", f"--rw={case.pattern}", f"--bs={case.block_size}"),
        *(f"--iodepth={case.depth}", f"--size={size // case.part}", "--output-format=json", "--randseed=7"),
    ]
    if case.fresh:
        argv += [f"--io_size={min(FIRST_WRITES * case.block_size, size)}", "--fsync=64", "--end_fsync=1"]
    else:
        argv += ["--time_based", f"--runtime={round(seconds * 1000)}ms", "--ramp_time=300ms", "--norandommap"]
    said = _run(argv)
    job: dict[str, Any] = json.loads(said[said.index("{") :])["jobs"][0]
    figures = job["write" if case.writes else "read"]
    return float(figures["iops"]) if case.unit == "IOPS" else float(figures["bw_bytes"]) / (1 << 20)


def _run(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
