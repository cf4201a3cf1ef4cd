"""AES-XTS with a sector as the data unit (IEEE Std 1619-2018).

Every block is encrypted between two XORs with its tweak. The tweaks of many sectors are made by numpy, and one call
encrypts all their blocks.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from nbdserve.formats.encryption.ciphers import (
    BLOCK,
    BLOCKS_PER_SECTOR,
    SECTORS_AT_ONCE,
    WORD,
    AesBlocks,
    IvGenerator,
    SectorCipher,
    Words,
)

_LINE: Final = 64
_PAGE: Final = 4096


class XtsCipher(SectorCipher):
    """AES-XTS."""

    def __init__(self, key: bytes, ivs: IvGenerator) -> None:
        """``key``: two AES keys of one length; the second makes the tweaks."""
        half = len(key) // 2
        self._encrypt_blocks = AesBlocks(key[:half], encrypting=True)
        self._decrypt_blocks = AesBlocks(key[:half], encrypting=False)
        self._tweak_blocks = AesBlocks(key[half:], encrypting=True)
        self._ivs = ivs
        self._idle: list[_Workspace] = []

    def _vectors(self, numbers: Words) -> Words:
        return np.frombuffer(self._tweak_blocks(self._ivs(numbers).data.cast("B")), WORD).reshape(-1, 2)

    def _decrypt(self, ivs: Words, source: Words, target: Words) -> None:
        self._apply(self._decrypt_blocks, ivs, source, target)

    def _encrypt(self, ivs: Words, source: Words, target: Words) -> None:
        self._apply(self._encrypt_blocks, ivs, source, target)

    def _apply(self, blocks: AesBlocks, ivs: Words, source: Words, target: Words) -> None:
        try:
            workspace = self._idle.pop()
        except IndexError:
            workspace = _Workspace()
        use = workspace.use(len(ivs))
        use.make_tweaks(ivs)
        np.bitwise_xor(source, use.tweaks, use.whitened)
        blocks.into(use.whitened_bytes, use.converted_room)
        np.bitwise_xor(use.converted, use.tweaks, target)
        self._idle.append(workspace)


class _Workspace:
    """Memory for what is made of SECTORS_AT_ONCE sectors, used by one caller at a time."""

    def __init__(self) -> None:
        blocks = SECTORS_AT_ONCE * BLOCKS_PER_SECTOR
        lengths = [blocks] * 6 + [2 * blocks] * 2 + [2 * blocks + BLOCK // 8]
        # Arrays that begin at the same place of a page would get into each other's way in the processor's cache.
        memory = np.zeros(sum(lengths) + (len(lengths) + 1) * _PAGE // 8, WORD)
        at = -memory.ctypes.data % _PAGE // 8
        self._arrays: list[Words] = []
        for number, length in enumerate(lengths):
            start = at + number * 5 * _LINE // 8
            self._arrays.append(memory[start : start + length])
            at += -(-length // (_PAGE // 8)) * (_PAGE // 8)
        shift, carry = self._arrays[:2]
        shift[:] = np.tile(np.arange(BLOCKS_PER_SECTOR, dtype=WORD), SECTORS_AT_ONCE)
        carry[:] = np.uint64(64) - shift
        self._uses: dict[int, _Use] = {}

    def use(self, sectors: int) -> _Use:
        """The memory as so many sectors need it; it is cut once."""
        use = self._uses.get(sectors)
        if use is None:
            use = self._uses[sectors] = _Use(self._arrays, sectors)
        return use


class _Use:
    """The arrays of a workspace for a number of sectors."""

    def __init__(self, arrays: list[Words], sectors: int) -> None:
        blocks = sectors * BLOCKS_PER_SECTOR
        self._shift, self._carry, self._low, self._high, self._out, self._part = (
            array[:blocks] for array in arrays[:6]
        )
        self._low_rows = self._low.reshape(sectors, BLOCKS_PER_SECTOR)
        self._high_rows = self._high.reshape(sectors, BLOCKS_PER_SECTOR)
        self.tweaks, self.whitened, self.converted = (array[: 2 * blocks] for array in arrays[6:])
        self._low_tweaks, self._high_tweaks = self.tweaks[0::2], self.tweaks[1::2]
        self.whitened_bytes = self.whitened.data.cast("B")
        self.converted_room = arrays[8][: 2 * blocks + BLOCK // 8].data.cast("B")
        self._1, self._5 = np.array(1, WORD), np.array(5, WORD)

    def make_tweaks(self, ivs: Words) -> None:
        """Fill ``tweaks``: block j of a sector has the sector's tweak times x^j in GF(2^128).

        Little endian: shifted left by j bits, and the j bits c that leave on the left come back as
        c * (x^7 + x^2 + x + 1) = ((c x^5 + c) x + c) x + c. All j are less than 32, so that the product does not leave
        on the left in turn.
        """
        low, high, out, part = self._low, self._high, self._out, self._part
        np.copyto(self._low_rows, ivs[:, 0:1])
        np.copyto(self._high_rows, ivs[:, 1:2])
        np.right_shift(high, self._carry, out)  # a shift by 64 is zero in numpy
        np.left_shift(high, self._shift, high)
        np.right_shift(low, self._carry, part)
        np.bitwise_or(high, part, self._high_tweaks)
        np.left_shift(low, self._shift, low)
        np.left_shift(out, self._5, part)
        np.bitwise_xor(part, out, part)
        np.left_shift(part, self._1, part)
        np.bitwise_xor(part, out, part)
        np.left_shift(part, self._1, part)
        np.bitwise_xor(part, out, part)
        np.bitwise_xor(part, low, self._low_tweaks)
