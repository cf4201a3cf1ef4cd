"""Changes of an image as a whole under power loss, small (NBDSERVE_CRASH_STATES), and that the replay would notice."""

from __future__ import annotations

import dataclasses

import pytest

from tests.crash.changes import ChangeFailure, Plan, run_changes
from tests.crash.test_crash import SEED, STATES
from tests.support.geometries import CRASH_GEOMETRIES, named
from tests.support.images import needs_qemu

pytestmark = needs_qemu

PLAN = Plan(changes=4, states=STATES, qemu_every=20, continue_every=15)


@pytest.mark.parametrize("name", ["512", "512-rb64-snapshot", "4k-v2", "4k-backing", "4k-data", "16k-ext"])
def test_before_or_after_and_nothing_in_between(name: str) -> None:
    tally = run_changes(named(CRASH_GEOMETRIES, name), SEED, PLAN)
    assert tally.states >= STATES // 4


@pytest.mark.parametrize("function", ["_barrier_tables", "_barrier_header"])
def test_control_each_barrier_of_replaced_tables_is_needed(function: str) -> None:
    geometry = named(CRASH_GEOMETRIES, "512-snapshot")
    plan = Plan(changes=6, states=300, qemu_every=1000, continue_every=1000)
    sites: set[str] = set()
    for seed in range(SEED, SEED + 3):
        sites |= set(run_changes(geometry, seed, dataclasses.replace(plan, states=1)).sites)
    (site,) = (site for site in sites if f"rewrite:{function}:" in site)
    for seed in range(SEED, SEED + 6):
        try:
            run_changes(geometry, seed, dataclasses.replace(plan, ignored_site=site))
        except ChangeFailure:
            return
    raise AssertionError(f"nobody misses {site}")


BITMAPS = dataclasses.replace(PLAN, kinds=frozenset({"bitmaps", "grow", "shrink"}))


@pytest.mark.parametrize("name", ["512", "4k-data", "16k-ext"])
def test_stored_bitmaps_are_those_before_or_after(name: str) -> None:
    tally = run_changes(named(CRASH_GEOMETRIES, name), SEED, BITMAPS)
    assert tally.states >= STATES // 4
    assert tally.changes["bitmaps"]


def test_control_bitmaps_need_the_commit_before_the_header() -> None:
    geometry = named(CRASH_GEOMETRIES, "512")
    plan = dataclasses.replace(BITMAPS, states=300, qemu_every=1000, continue_every=1000)
    sites = run_changes(geometry, SEED, dataclasses.replace(plan, states=1)).sites
    for site in (site for site in sites if ":_barrier_refcounts_and_data:" in site):
        for seed in range(SEED, SEED + 3):
            try:
                run_changes(geometry, seed, dataclasses.replace(plan, ignored_site=site))
            except ChangeFailure:
                return
    raise AssertionError("nobody misses it")
