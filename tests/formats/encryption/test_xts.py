"""AES-XTS; ``test_ciphers.py`` compares it with the mode of the ``cryptography`` package."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nbdserve.formats.encryption.ciphers import BLOCKS_PER_SECTOR, SECTORS_AT_ONCE, WORD, IvGenerator
from nbdserve.formats.encryption.xts import XtsCipher, _Workspace


def test_a_vector_of_ieee_1619() -> None:
    """Vector 4 of annex B: AES-128, data unit 0, 512 bytes that count."""
    key = bytes.fromhex("2718281828459045235360287471352631415926535897932384626433832795")
    encrypted = XtsCipher(key, IvGenerator("plain64")).encrypt(0, bytes(range(256)) * 2)
    assert encrypted[:32].hex() == "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c"
    assert encrypted[-16:].hex() == "0a282df920147beabe421ee5319d0568"


def doubled(tweak: int) -> int:
    """Times x, one bit at a time, as the standard has it (5.2)."""
    return (tweak << 1 & (1 << 128) - 1) ^ (0x87 if tweak >> 127 else 0)


@pytest.mark.parametrize("sectors", [1, 3, SECTORS_AT_ONCE])
def test_the_tweaks_are_powers(sectors: int) -> None:
    rng = random.Random(sectors)
    firsts = [rng.choice([0, 1, 1 << 127, (1 << 128) - 1, rng.getrandbits(128)]) for _ in range(sectors)]
    wanted = []
    for first in firsts:
        wanted.append(first)
        for _ in range(BLOCKS_PER_SECTOR - 1):
            wanted.append(doubled(wanted[-1]))
    ivs = np.frombuffer(b"".join(tweak.to_bytes(16, "little") for tweak in firsts), WORD).reshape(-1, 2)
    use = _Workspace().use(sectors)
    use.make_tweaks(ivs)
    assert use.tweak_octets.tobytes() == b"".join(tweak.to_bytes(16, "little") for tweak in wanted)


def test_the_arrays_of_a_workspace_do_not_overlap() -> None:
    workspace = _Workspace()
    for number, array in enumerate(workspace._arrays):
        array[:] = number
    assert [set(array.tolist()) for array in workspace._arrays] == [
        {number} for number in range(len(workspace._arrays))
    ]
