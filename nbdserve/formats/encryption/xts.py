"""AES-XTS with a sector as the data unit (IEEE Std 1619-2018).

Every block is encrypted between two XORs with its tweak. The tweaks of many sectors are made by numpy, and one call
encrypts all their blocks.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy import bitwise_or, bitwise_xor, copyto, left_shift, right_shift

from nbdserve.formats.encryption.ciphers import (
    BLOCK,
    BLOCKS_PER_SECTOR,
    SECTORS_AT_ONCE,
    WORD,
    AesBlocks,
    IvGenerator,
    Octets,
    SectorCipher,
    Words,
)

_LINE: Final = 64
_PAGE: Final = 4096
_MOST_BLOCKS: Final = SECTORS_AT_ONCE * BLOCKS_PER_SECTOR
_ONE: Final = np.array(1, WORD)
_FIVE: Final = np.array(5, WORD)


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

    def _decrypt(self, ivs: Words, source: Octets, target: Octets) -> None:
        self._apply(self._decrypt_blocks, ivs, source, target)

    def _encrypt(self, ivs: Words, source: Octets, target: Octets) -> None:
        self._apply(self._encrypt_blocks, ivs, source, target)

    def _apply(self, blocks: AesBlocks, ivs: Words, source: Octets, target: Octets) -> None:
        try:
            workspace = self._idle.pop()
        except IndexError:
            workspace = _Workspace()
        use = workspace.use(len(ivs))
        use.make_tweaks(ivs)
        bitwise_xor(source, use.tweak_octets, use.whitened)
        blocks.into(use.whitened_bytes, use.converted_room)
        bitwise_xor(use.converted, use.tweak_octets, target)
        self._idle.append(workspace)


class _Workspace:
    """Memory for what is made of SECTORS_AT_ONCE sectors, used by one caller at a time."""

    def __init__(self) -> None:
        lengths = [2 * _MOST_BLOCKS] * 7 + [_MOST_BLOCKS, 2 * _MOST_BLOCKS + BLOCK // 8]
        # Arrays that begin at the same place of a page would get into each other's way in the processor's cache.
        memory = np.zeros(sum(lengths) + (len(lengths) + 1) * _PAGE // 8, WORD)
        at = -memory.ctypes.data % _PAGE // 8
        self._arrays: list[Words] = []
        for number, length in enumerate(lengths):
            start = at + number * 5 * _LINE // 8
            self._arrays.append(memory[start : start + length])
            at += -(-length // (_PAGE // 8)) * (_PAGE // 8)
        shift, carry = self._arrays[:2]
        shift[:] = np.tile(np.arange(BLOCKS_PER_SECTOR, dtype=WORD), 2 * SECTORS_AT_ONCE)
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
        self._shift, self._carry, self._halves, self._left, self._right, tweaks, whitened = (
            array[: 2 * blocks] for array in arrays[:7]
        )
        self._folded = arrays[7][:blocks]
        self._rows = self._halves.reshape(2, sectors, BLOCKS_PER_SECTOR)
        self._low_left, self._high_left = self._left[:blocks], self._left[blocks:]
        self._low_out, self._high_out = self._right[:blocks], self._right[blocks:]
        self._low_tweaks, self._high_tweaks = tweaks[0::2], tweaks[1::2]
        self.tweak_octets, self.whitened = tweaks.view(np.uint8), whitened.view(np.uint8)
        self.whitened_bytes = self.whitened.data
        converted = arrays[8][: 2 * blocks + BLOCK // 8].view(np.uint8)
        self.converted, self.converted_room = converted[:-BLOCK], converted.data

    def make_tweaks(self, ivs: Words) -> None:
        """Fill ``tweak_octets``: block j of a sector has the sector's tweak times x^j in GF(2^128).

        Little endian: shifted left by j bits, and the j bits c that leave on the left come back as
        c * (x^7 + x^2 + x + 1) = ((c x^5 + c) x + c) x + c. All j are less than 32, so that the product does not leave
        on the left in turn. The low and the high halves of all blocks lie behind each other, to be shifted in one call.
        """
        folded, out = self._folded, self._high_out
        copyto(self._rows, ivs.T[:, :, None])
        left_shift(self._halves, self._shift, self._left)
        right_shift(self._halves, self._carry, self._right)  # a shift by 64 is zero in numpy
        bitwise_or(self._high_left, self._low_out, self._high_tweaks)
        left_shift(out, _FIVE, folded)
        bitwise_xor(folded, out, folded)
        left_shift(folded, _ONE, folded)
        bitwise_xor(folded, out, folded)
        left_shift(folded, _ONE, folded)
        bitwise_xor(folded, out, folded)
        bitwise_xor(folded, self._low_left, self._low_tweaks)
