"""The fuzz of image files, small: NBDSERVE_FUZZ_IMAGES mutations and as many cases of the header sweep per format."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from nbdserve.formats.qcow2.image import Qcow2Image
from tests.property import fuzz_images
from tests.property.fuzz_images import (
    Case,
    FuzzFailure,
    geometries_of,
    limit_address_space,
    mutations,
    run_case,
    run_cases,
    sweep,
    swept,
)
from tests.support.geometries import CRASH_GEOMETRIES, KITS, Field, named
from tests.support.images import needs_qemu

IMAGES = int(os.environ.get("NBDSERVE_FUZZ_IMAGES", "50"))
GEOMETRIES = int(os.environ.get("NBDSERVE_FUZZ_GEOMETRIES", "3"))
"""Of each format: making them takes most of the time."""
SEED = int(os.environ.get("NBDSERVE_SEED", "1"))

pytestmark = needs_qemu


@pytest.mark.parametrize("fmt", KITS)
def test_damaged_images_open_or_are_refused(fmt: str) -> None:
    geometries = random.Random(SEED).sample(geometries_of(fmt), min(GEOMETRIES, len(geometries_of(fmt))))
    cases = mutations(fmt, IMAGES, SEED, geometries) + swept(fmt, IMAGES, SEED, geometries)
    with ProcessPoolExecutor(1, initializer=limit_address_space) as pool:
        report = pool.submit(run_cases, cases).result()
    assert not report.failures, "\n".join(report.failures)
    assert sum(report.outcomes.values()) == len(cases)
    if fmt != "raw":
        assert any("refused" in outcome for outcome in report.outcomes), report.outcomes


def test_a_case_is_made_again_from_its_numbers() -> None:
    geometry = named(CRASH_GEOMETRIES, "512")
    assert Case(geometry, 7).contents() == Case(geometry, 7).contents()
    assert Case(geometry, 7).contents() != Case(geometry, 8).contents()
    version = Field("version", 4, 4, "big")
    assert Case(geometry, 0, version, 0xFFFF_FFFE).contents()[0][4:8] == b"\xff\xff\xff\xfe"
    values = [case.value for case in sweep(geometry) if case.field == version]
    assert {0, 1, 2, 0x7FFF_FFFF, 0xFFFF_FFFE, 0xFFFF_FFFF} <= set(values)
    assert 3 not in values, "it is what the image has"


def _control(tmp_path: Path, problem: str) -> None:
    with pytest.raises(FuzzFailure, match=problem):
        run_case(Case(named(CRASH_GEOMETRIES, "4k"), 0, Field("magic", 0, 4, "big"), 0x514649FB), tmp_path)


def test_control_time_and_memory_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Qcow2Image.open.__func__  # type: ignore[attr-defined]

    async def greedy(*arguments: object, **options: object) -> object:
        assert len(b"x" * (80 << 20)) == 80 << 20
        return await opened(*arguments, **options)

    monkeypatch.setattr(Qcow2Image, "open", classmethod(greedy))
    _control(tmp_path, "open and read: .*MiB")

    async def slow(*arguments: object, **options: object) -> object:
        until = time.process_time() + 0.5
        while time.process_time() < until:
            pass
        return await opened(*arguments, **options)

    monkeypatch.setattr(Qcow2Image, "open", classmethod(slow))
    monkeypatch.setattr(fuzz_images, "SECONDS", 0.4)
    _control(tmp_path, "processor time")


def test_control_a_changed_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Qcow2Image.open.__func__  # type: ignore[attr-defined]

    async def careless(*arguments: object, **options: object) -> object:
        (tmp_path / "canary").write_bytes(b"touched")
        return await opened(*arguments, **options)

    monkeypatch.setattr(Qcow2Image, "open", classmethod(careless))
    _control(tmp_path, "changed canary")
