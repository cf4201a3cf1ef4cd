"""The barriers of formats with a one-level map: without any one of them the crash replay finds lost or foreign data."""

from __future__ import annotations

import dataclasses
import types

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


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("vdi-ours", "_barrier_data"),
        ("vdi-ours", "_barrier_header"),
        ("parallels-4k-odd", "_barrier_data"),
        ("parallels-4k-odd", "_barrier_map"),
    ],
)
def test_control_each_barrier_is_needed(name: str, function: str) -> None:
    geometry = named(CRASH_GEOMETRIES, name)
    sites = _sites(geometry, function)
    assert sites
    for site in sites:
        assert _is_missed(geometry, site), f"nobody misses {site}"


@pytest.mark.parametrize("function", ["make_room", "finish", "_write_header"])
def test_control_each_step_to_room_for_a_second_map_is_needed(function: str) -> None:
    """The image has data when it is opened: without a barrier some of it is lost, or another block's."""
    geometry = named(CRASH_GEOMETRIES, "vdi-own")
    (site,) = _sites(geometry, function)
    assert _is_missed(geometry, site), f"nobody misses {site}"


def test_control_qemu_misses_the_second_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one map the count of allocated blocks and the entries differ after some crash: an error for its check."""
    monkeypatch.setattr("nbdserve.formats.vdi.driver.TwoMaps", types.SimpleNamespace(of=lambda header: None))
    plan = dataclasses.replace(CONTROL, states=60, qemu_every=1)
    with pytest.raises(CrashFailure, match="allocated blocks mismatch"):
        run_scenario(named(CRASH_GEOMETRIES, "vdi-ours"), SEED, plan)
