"""Live jobs under random writes; ``python -m tests.jobs --rounds N`` does more."""

from __future__ import annotations

import pytest

from tests.jobs.rounds import KINDS, run_round


@pytest.mark.parametrize("kind", KINDS)
def test_a_live_job_under_random_writes(kind: str) -> None:
    assert run_round(kind, 1).startswith(kind)
