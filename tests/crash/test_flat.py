"""The barriers of formats with a one-level map: without any one of them the crash replay finds lost or foreign data."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.errors import ImageError, RequestError
from nbdserve.formats.vdi.driver import VdiDriver
from nbdserve.units import MIB
from tests.crash.scenario import CrashFailure, run_scenario
from tests.crash.test_crash import CONTROL, SEED
from tests.support import images
from tests.support.geometries import CRASH_GEOMETRIES, Geometry, named
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import Replay

pytestmark = images.needs_qemu


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


async def _make_room(stored: bytes, model: bytes, site: str | None = None) -> tuple[set[str], bool]:
    """Where barriers are when room for a second map is made, and whether every crash leaves the disk as it is."""
    recorder = Recorder(SEED, ignored_site=site)
    driver = await VdiDriver.open(recorder.storage(stored), {}, read_only=False)
    await driver.make_room()
    await driver.close()
    for state in Replay(recorder, None, SEED).states(100):
        try:
            reader = await VdiDriver.open(ByteStorage(state.contents[0]), {}, read_only=True)
            whole = await Node([reader]).read(0, len(model)) == model
        except (ImageError, RequestError):
            whole = False
        if not whole:
            return set(recorder.sites), False
    return set(recorder.sites), True


async def test_control_each_step_to_room_for_a_second_map_is_needed(tmp_path: Path) -> None:
    """Without a barrier some of the data that was there is lost, or another block's."""
    path = tmp_path / "a.vdi"
    images.create(path, 5 * MIB, fmt="vdi")
    images.qemu_io(path, "vdi", [f"write -P {block + 1} {block}M 1M" for block in (3, 1, 4)])
    stored, model = path.read_bytes(), b"".join(bytes([value]) * MIB for value in (0, 2, 0, 4, 5))
    sites, whole = await _make_room(stored, model)
    assert whole
    for function in ("make_room", "finish", "_write_header"):
        (site,) = (site for site in sites if f"room:{function}:" in site)
        assert not (await _make_room(stored, model, site))[1], f"nobody misses {site}"


def test_control_qemu_misses_the_second_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one map the count of allocated blocks and the entries differ after some crash: an error for its check."""
    monkeypatch.setattr("nbdserve.formats.vdi.driver.TwoMaps", types.SimpleNamespace(of=lambda header: None))
    plan = dataclasses.replace(CONTROL, states=60, qemu_every=1)
    with pytest.raises(CrashFailure, match="allocated blocks mismatch"):
        run_scenario(named(CRASH_GEOMETRIES, "vdi-ours"), SEED, plan)
