"""How random tests behave: the same examples every time, without a time limit for one.

How long an example takes says nothing about the code, on a machine that does other things besides. Other examples each
time: NBDSERVE_RANDOM=1.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "repeated",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="NBDSERVE_RANDOM" not in os.environ,
)
settings.load_profile("repeated")
