"""The differential rounds, small: NBDSERVE_ROUNDS per geometry, of NBDSERVE_OPS operations each."""

from __future__ import annotations

import os

import pytest

from tests.differential.rounds import run_round
from tests.support.geometries import DIFFERENTIAL_GEOMETRIES, Geometry
from tests.support.images import needs_qemu

ROUNDS = int(os.environ.get("NBDSERVE_ROUNDS", "1"))
OPERATIONS = int(os.environ.get("NBDSERVE_OPS", "80"))
SEED = int(os.environ.get("NBDSERVE_SEED", "1"))


@needs_qemu
@pytest.mark.parametrize("geometry", DIFFERENTIAL_GEOMETRIES, ids=str)
def test_everybody_agrees_on_every_byte(geometry: Geometry) -> None:
    for number in range(ROUNDS):
        run_round(geometry, SEED + number, OPERATIONS)
