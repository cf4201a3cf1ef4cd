"""The barriers of formats with a one-level map: without any one of them the crash replay finds lost or foreign data."""

from __future__ import annotations

import dataclasses

import pytest

from tests.crash.scenario import CrashFailure, run_scenario
from tests.crash.test_crash import CONTROL, SEED
from tests.support.geometries import CRASH_GEOMETRIES, Geometry, named
from tests.support.images import needs_qemu

pytestmark = needs_qemu


def _sites(geometry: Geometry, function: str) -> list[str]:
    found: set[str] = set()
    for seed in range(SEED, SEED + 3):
        found |= set(run_scenario(geometry, seed, dataclasses.replace(CONTROL, states=1)).sites)
    return sorted(site for site in found if f":{function}:" in site)


def _is_missed(geometry: Geometry, site: str) -> bool:
    for seed in range(SEED, SEED + 8):
        try:
            run_scenario(geometry, seed, dataclasses.replace(CONTROL, ignored_site=site))
        except CrashFailure:
            return True
    return False


@pytest.mark.parametrize("function", ["_barrier_data", "_barrier_map"])
@pytest.mark.parametrize("name", ["vdi-ours", "parallels-4k-odd"])
def test_control_each_barrier_is_needed(name: str, function: str) -> None:
    geometry = named(CRASH_GEOMETRIES, name)
    sites = _sites(geometry, function)
    assert sites
    for site in sites:
        assert _is_missed(geometry, site), f"nobody misses {site}"
