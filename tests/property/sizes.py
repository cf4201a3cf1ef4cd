"""How much the property tests of the protocol do: NBDSERVE_FUZZ is the number of examples of each."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("NBDSERVE_FUZZ", "60"))

sized = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
