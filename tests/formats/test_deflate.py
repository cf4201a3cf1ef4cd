from __future__ import annotations

import random

from nbdserve.formats.deflate import deflate, deflate_all
from nbdserve.formats.inflate import DEFLATE_4K_WINDOW, inflate


def test_what_was_deflated_is_inflated() -> None:
    cluster = b"".join(b"%d apples, " % number for number in range(9000))[:65536]
    stored = deflate(cluster)
    assert stored is not None
    assert len(stored) < len(cluster) // 2
    assert inflate(stored, len(cluster), window_bits=DEFLATE_4K_WINDOW) == cluster


def test_what_does_not_get_smaller() -> None:
    noise = random.Random(1).randbytes(4096)
    assert deflate(noise) is None
    stored = deflate_all(memoryview(bytes(4096) + noise + bytes(4096)), 4096)
    assert [part is None for part in stored] == [False, True, False]
