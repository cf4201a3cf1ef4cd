"""The crash replay, small (NBDSERVE_CRASH_STATES per geometry), and the controls that show it would notice."""

from __future__ import annotations

import dataclasses
import os

import pytest

from nbdserve.block.writer import WRITE_DONE, WRITE_TAKEN, WRITE_WAIT
from tests.crash.scenario import CrashFailure, Plan, run_scenario
from tests.support.geometries import CRASH_GEOMETRIES, Geometry, named
from tests.support.images import needs_qemu
from tests.support.workload import Mix

STATES = int(os.environ.get("NBDSERVE_CRASH_STATES", "40"))
SEED = int(os.environ.get("NBDSERVE_SEED", "1"))
PLAN = Plan(operations=30, states=STATES, qemu_every=20, continue_every=30)
CONTROL = Plan(operations=60, states=500, qemu_every=0, continue_every=0, mix=Mix(largest=32 << 10, in_flight=3))
IN_PLACE = Mix(zero=0, discard=0, flush=6, fua=0, unaligned=0, largest=32 << 10, in_flight=3, hot=1.0)
"""Nearly all of these writes find their clusters allocated: commits with no count to write."""

pytestmark = needs_qemu


@pytest.mark.parametrize("geometry", CRASH_GEOMETRIES, ids=str)
def test_every_promise_survives_power_loss(geometry: Geometry) -> None:
    tally = run_scenario(geometry, SEED, PLAN)
    assert tally.states >= STATES // 2


def test_the_guest_writes_in_every_way() -> None:
    for name in ("raw", "512", "4k-backing", "64k-ext-data"):
        outcomes = run_scenario(named(CRASH_GEOMETRIES, name), SEED, CONTROL).outcomes
        assert min(outcomes[WRITE_DONE], outcomes[WRITE_TAKEN]) >= 3, (name, outcomes)
        assert outcomes[WRITE_WAIT] or name == "raw", (name, outcomes)


def _breaks(geometry: Geometry, site: str) -> str:
    """What the replay says when the flush at ``site`` does nothing; empty if it never notices."""
    for seed in range(SEED, SEED + 12):
        mix = IN_PLACE if seed % 3 == 2 else CONTROL.mix
        try:
            run_scenario(geometry, seed, dataclasses.replace(CONTROL, ignored_site=site, mix=mix))
        except CrashFailure as failure:
            return str(failure)
    return ""


def _sites(geometry: Geometry, function: str) -> list[str]:
    """The flushes in ``function`` that a run of the guest comes to."""
    sites: set[str] = set()
    for seed in range(SEED, SEED + 4):
        found = run_scenario(geometry, seed, dataclasses.replace(CONTROL, states=1)).sites
        sites |= {site for site in found if f"commit:{function}:" in site}
    return sorted(sites)


def test_control_raw_without_its_flush() -> None:
    raw = named(CRASH_GEOMETRIES, "raw")
    (site,) = run_scenario(raw, SEED, CONTROL).sites
    assert _breaks(raw, site)


@pytest.mark.parametrize(
    ("name", "function", "count"),
    [
        ("512", "_barrier_new_refcount_blocks", 1),
        ("512-rb64-full", "_barrier_refcount_table", 1),
        ("512", "_barrier_refcounts_and_data", 2),
        ("512-data", "_barrier_refcounts_and_data", 2),
        ("512", "_barrier_mapping", 1),
    ],
)
def test_control_each_barrier_of_the_commit_is_needed(name: str, function: str, count: int) -> None:
    """Without any one of them the replay finds lost data, foreign data or corrupt metadata.

    The flush behind a header that names a moved refcount table is not among them: the next barrier covers it.
    """
    geometry = named(CRASH_GEOMETRIES, name)
    sites = _sites(geometry, function)
    assert len(sites) == count
    for site in sites:
        assert _breaks(geometry, site), f"nobody misses {site}"


def test_control_raw_cow_without_either_flush() -> None:
    """Bits before their data are stable show what the raw file held before; bits that are not stable hide data."""
    geometry = named(CRASH_GEOMETRIES, "raw-cow-512-backing")
    sites = set().union(*(run_scenario(geometry, seed, CONTROL).sites for seed in range(SEED, SEED + 4)))
    assert {site.split(":")[1] for site in sites} == {"_barrier_data", "_barrier_bits"}
    for site in sites:
        assert _breaks(geometry, site), f"nobody misses {site}"


def test_control_two_levels_without_either_barrier() -> None:
    """Entries before their data, or new tables, are stable show what the file held before; others hide data."""
    geometry = named(CRASH_GEOMETRIES, "qcow")
    sites = set().union(*(run_scenario(geometry, seed, CONTROL).sites for seed in range(SEED, SEED + 4)))
    needed = [site for site in sites if site.split(":")[1] in ("_barrier_data", "_barrier_mapping")]
    assert len(needed) == 3
    for site in needed:
        assert _breaks(geometry, site), f"nobody misses {site}"
