from __future__ import annotations

from tests.property.fuzz_protocol import run
from tests.property.sizes import EXAMPLES


def test_mutated_sessions_end_in_events_or_one_protocol_error() -> None:
    assert "no unhandled exception" in run(3 * EXAMPLES, 1)
