"""The legacy AES encryption of qcow and qcow2: the initialisation vector is the number of the *guest's* sector.

A storage only knows where something is in the file, so these drivers answer with a place that tells both: the host
offset, and above its 64 bits how far the guest offset is from it, which is the same all through a run.

Source: docs/interop/qcow2.rst, ``crypt_method`` 1; QEMU's documentation calls it insecure and offers it for old images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from nbdserve.extents import COMPRESSED, DATA, Run, RunArray, RunStream
from nbdserve.formats.base import Allocation, FormatDriver
from nbdserve.formats.encryption.ciphers import CbcCipher, IvGenerator, LockedCipher, SectorCipher, needed_secret
from nbdserve.formats.encryption.storage import EncryptedStorage
from nbdserve.units import SECTOR_SIZE

KEY_BYTES: Final = 16
_HOST_BITS: Final = 64
_HOST_MASK: Final = (1 << _HOST_BITS) - 1
_BIAS: Final = 1 << _HOST_BITS
"""Keeps a place from being negative, which stands for none."""


def aes_cipher(options: Mapping[str, Any], path: str) -> SectorCipher:
    """AES-128-CBC under the first 16 bytes of the passphrase, zero padded.

    Options: ``secret``, the passphrase; with ``metadata_only`` it is not asked for, and the content is locked. A wrong
    passphrase cannot be told from the right one: what is read is noise.
    """
    if options.get("metadata_only"):
        return LockedCipher(path)
    secret = needed_secret(options, path)
    return CbcCipher(secret[:KEY_BYTES].ljust(KEY_BYTES, b"\0"), IvGenerator("plain64"))


def place_of(host_offset: int, guest_offset: int) -> int:
    """The place that tells both offsets; it may be advanced like an offset."""
    return (guest_offset - host_offset + _BIAS) << _HOST_BITS | host_offset


class GuestSectorStorage(EncryptedStorage):
    """Offsets are places."""

    def _place(self, offset: int) -> tuple[int, int]:
        host_offset = offset & _HOST_MASK
        return host_offset, (host_offset + (offset >> _HOST_BITS) - _BIAS) // SECTOR_SIZE


class GuestSectorDriver(FormatDriver):
    """Mixed into a driver, before it: its DATA runs and allocations are at places.

    The driver underneath sees host offsets only.
    """

    def lookup(self, offset: int, length: int) -> Run | None:
        """As the driver's."""
        return _placed(super().lookup(offset, length), offset)  # type: ignore[safe-super]

    async def iter_runs(self, start: int, end: int) -> RunStream:
        """As the driver's, without host offsets: the bytes there are not the guest's."""
        async for runs in super().iter_runs(start, end):  # type: ignore[safe-super]
            host_offset = np.where(runs.kind == COMPRESSED, runs.host_offset, -1)
            yield RunArray(runs.start, runs.length, runs.kind, host_offset).coalesced()

    def lookup_writable(self, offset: int, length: int) -> Run | None:
        """As the driver's."""
        return _placed(super().lookup_writable(offset, length), offset)

    def allocate(self, offset: int, length: int) -> Allocation | None:
        """As the driver's."""
        allocation = super().allocate(offset, length)
        if allocation is not None:
            allocation.host_offset = place_of(allocation.host_offset, allocation.offset)
            allocation.zeroed = False  # zeroes in the file are noise to the guest
        return allocation

    def publish(self, allocation: Allocation) -> None:
        """As the driver's."""
        allocation.host_offset &= _HOST_MASK
        super().publish(allocation)

    def abandon(self, allocation: Allocation) -> None:
        """As the driver's."""
        allocation.host_offset &= _HOST_MASK
        super().abandon(allocation)

    def data_place(self, host_offset: int, guest_offset: int) -> int:
        """Where ``data`` has the guest bytes that are at ``host_offset``."""
        return place_of(host_offset, guest_offset)


def _placed(run: Run | None, offset: int) -> Run | None:
    if run is None or run[0] != DATA:
        return run
    kind, length, host_offset = run
    return kind, length, place_of(host_offset, offset)
