"""LUKS volumes are unlocked by real work once, however often the same one is opened.

A passphrase takes 60 ms even with few iterations, most of them to merge the stripes of the key: more than all else that
is done with one state of a crash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from unittest import mock

from nbdserve.formats.luks import keys
from nbdserve.formats.luks.layout import Header, KeySlot

_MOST: Final = 10_000
_unlock: Final = keys._open_slot
_known: Final[dict[tuple[object, ...], bytes | None]] = {}
"""The key, or that it is not one, by everything it comes from."""


@contextmanager
def remembered_keys() -> Iterator[None]:
    """Inside, the key slots of LUKS headers are opened from memory where all that goes into a key is the same."""
    with mock.patch.object(keys, "_open_slot", _open_slot):
        yield


def _open_slot(header: Header, slot: KeySlot, material: bytearray, secret: bytes) -> bytes | None:
    sums = (header.digest, header.digest_salt, header.digest_iterations)
    known = (header.hash, header.cipher, *sums, slot, hashlib.sha256(material).digest(), secret)
    if known not in _known:
        if len(_known) >= _MOST:
            _known.clear()
        _known[known] = _unlock(header, slot, material, secret)
    return _known[known]
