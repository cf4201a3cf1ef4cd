"""A draft reads as if its changes were made, and makes them in their order when told."""

from __future__ import annotations

import errno
import random

import pytest

from nbdserve.storage import draft as module
from nbdserve.storage.draft import Draft
from nbdserve.storage.memory import MemoryStorage
from tests.support.recording import Barrier, Change, Recorder

SIZE = 50_000


async def test_it_reads_as_if_the_changes_were_made_and_nothing_is_changed_below() -> None:
    rng = random.Random(1)
    content = bytearray(rng.randbytes(SIZE))
    below = MemoryStorage(bytes(content))
    draft = Draft(below)
    for _ in range(60):
        offset, length = rng.randrange(SIZE), rng.randrange(1, 9000)
        if rng.random() < 0.7:
            data = rng.randbytes(length)
            await draft.write(offset, data)
        else:
            data = bytes(length)
            await draft.zero(offset, length)
        content.extend(bytes(max(0, offset + length - len(content))))
        content[offset : offset + length] = data
        await draft.discard(0, SIZE)
        assert draft.size == len(content)
        start = rng.randrange(len(content))
        assert await draft.read(start, 10_000) == content[start : start + 10_000].ljust(10_000, b"\0")
    assert below.size == SIZE
    await draft.truncate(len(content) + 1000)
    await draft.apply()
    assert await below.read(0, below.size) == content + bytes(1000)
    with pytest.raises(OSError, match="not cut"):
        await draft.truncate(100)


async def test_the_changes_are_made_in_their_order_with_their_barriers() -> None:
    recorder = Recorder(jitter=0)
    draft = Draft(recorder.storage(bytes(4096)))
    await draft.write(0, b"a" * 512)
    await draft.write_stable([(512, b"b" * 512)])
    await draft.write(0, b"c" * 512)
    assert recorder.log == []
    await draft.apply()
    told = [entry.data[:1] if isinstance(entry, Change) else isinstance(entry, Barrier) for entry in recorder.log]
    assert told == [b"a", b"b", True, b"c", True]


async def test_what_is_dropped_never_happened() -> None:
    below = MemoryStorage(b"x" * 100)
    draft = Draft(below)
    await draft.write(50, b"y" * 100)
    await draft.close()
    assert await below.read(0, 200) == b"x" * 100 + bytes(100)


async def test_it_does_not_grow_without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DRAFT_BYTES", 10_000)
    draft = Draft(MemoryStorage(bytes(100_000)))
    await draft.write(0, bytes(10_000))
    with pytest.raises(OSError, match="more than") as caught:
        await draft.write(20_000, b"x")
    assert caught.value.errno == errno.EFBIG
