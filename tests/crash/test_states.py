"""The proving ground itself: which states a recorded log gives, and what the model forbids."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.model import ModelDisk, ModelError, stamps
from tests.support.recording import Recorder
from tests.support.replay import KINDS, Replay

SECTOR = 512


class _Anything:
    """A follower that notes nothing."""


async def _recorded(*steps: tuple[str, int, bytes | int]) -> Recorder:
    recorder = Recorder(jitter=0)
    store = recorder.storage(bytes(4 * SECTOR))
    for kind, offset, value in steps:
        if isinstance(value, bytes):
            await store.write(offset, value)
        elif kind == "zero":
            await store.zero(offset, value)
        elif kind == "truncate":
            await store.truncate(offset)
        elif kind == "extend":
            await store.extend(offset)
        else:
            await store.flush()
    return recorder


def _states(recorder: Recorder, budget: int = 400) -> list[tuple[str, bytes]]:
    return [(s.kind, bytes(s.contents[0])) for s in Replay(recorder, _Anything(), 1).states(budget)]


async def test_what_was_flushed_is_in_every_state() -> None:
    a, b = b"a" * SECTOR, b"b" * SECTOR
    recorder = await _recorded(("write", 0, a), ("flush", 0, 0), ("write", SECTOR, b))
    states = _states(recorder)
    assert {kind for kind, _ in states} >= set(KINDS) - {"lost"}
    before, after = a + bytes(3 * SECTOR), a + b + bytes(2 * SECTOR)
    assert {content for _, content in states} == {bytes(4 * SECTOR), before, after}


async def test_unsynced_changes_come_in_any_combination_of_sectors() -> None:
    recorder = await _recorded(("write", 0, b"x" * 2 * SECTOR), ("write", 3 * SECTOR, b"y" * SECTOR))
    seen = {tuple(content[i * SECTOR] != 0 for i in (0, 1, 3)) for _, content in _states(recorder, 8000)}
    assert seen == {(p, q, r) for p in (False, True) for q in (False, True) for r in (False, True)}


async def test_growth_is_lost_without_a_flush() -> None:
    recorder = await _recorded(("write", 6 * SECTOR, b"x" * SECTOR), ("truncate", 9 * SECTOR, 0))
    assert {len(content) // SECTOR for _, content in _states(recorder)} == {4, 7, 9}


async def test_extending_cuts_nothing_off_that_was_written_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(jitter=0)
    store = recorder.storage(bytes(4 * SECTOR))
    go_on = asyncio.Event()
    monkeypatch.setattr(recorder, "pause", go_on.wait)
    extending = asyncio.create_task(store.extend(5 * SECTOR))
    await asyncio.sleep(0)
    while not store.try_write(6 * SECTOR, b"x" * SECTOR):
        pass
    go_on.set()
    await extending
    assert len(store.content) == 7 * SECTOR
    assert {len(content) // SECTOR for _, content in _states(recorder)} == {4, 5, 7}


async def test_a_flush_does_not_cover_what_is_in_flight() -> None:
    recorder = await _recorded(("write", 0, b"x" * SECTOR))
    change = recorder.log[0]
    change.completed = None  # type: ignore[union-attr]
    await recorder.stores[0].flush()
    await recorder.stores[0].write(SECTOR, b"y" * SECTOR)
    assert any(content[0] == 0 for _, content in _states(recorder)[-100:])


async def test_a_stable_later_write_is_never_overwritten_by_an_older_one() -> None:
    recorder = await _recorded(("write", 0, b"x" * 2 * SECTOR), ("write", 0, b"y" * SECTOR))
    recorder.log[0].completed = None  # type: ignore[union-attr]
    await recorder.stores[0].flush()
    await recorder.stores[0].write(3 * SECTOR, b"z" * SECTOR)
    late = _states(recorder)[-100:]
    assert {content[0] for _, content in late} <= {0, ord("x"), ord("y")}
    assert {content[0] for kind, content in late if content[3 * SECTOR]} == {ord("y")}


def test_model_allows_old_and_new_until_a_flush() -> None:
    model = ModelDisk(4 * SECTOR)
    write = model.issue("write", 0, SECTOR)
    model.complete(write)
    model.check_crash(bytes(4 * SECTOR))
    model.check_crash(write.data + bytes(3 * SECTOR))
    model.flushed(model.begin_flush())
    model.check_crash(write.data + bytes(3 * SECTOR))
    with pytest.raises(ModelError, match="zeroes"):
        model.check_crash(bytes(4 * SECTOR))


def test_model_keeps_what_a_flush_did_not_cover() -> None:
    model = ModelDisk(2 * SECTOR)
    first = model.issue("write", 0, SECTOR)
    begun = model.begin_flush()
    model.complete(first)
    model.flushed(begun)
    model.check_crash(bytes(2 * SECTOR))
    model.check_crash(first.data + bytes(SECTOR))


def test_model_fua_is_stable_alone() -> None:
    model = ModelDisk(2 * SECTOR)
    plain, fua = model.issue("write", 0, SECTOR), model.issue("write", SECTOR, SECTOR)
    model.complete(plain)
    model.complete(fua)
    model.stable(fua)
    model.check_crash(bytes(SECTOR) + fua.data)
    with pytest.raises(ModelError):
        model.check_crash(plain.data + bytes(SECTOR))


def test_model_recognises_foreign_data() -> None:
    model = ModelDisk(4 * SECTOR)
    write = model.issue("write", 0, 4 * SECTOR)
    model.complete(write)
    shifted = write.data[SECTOR : 2 * SECTOR] + write.data[SECTOR:]
    with pytest.raises(ModelError, match="FOREIGN DATA of \\(sector 1, write"):
        model.check_read(shifted)
    with pytest.raises(ModelError, match="UNKNOWN BYTES"):
        model.check_read(b"\x01" * SECTOR + write.data[SECTOR:])


def test_model_of_overtaking_writes() -> None:
    model = ModelDisk(SECTOR)
    a, b = model.issue("write", 0, SECTOR), model.issue("write", 0, SECTOR)
    model.complete(b)
    model.complete(a)
    for content in (a.data, b.data):
        model.check_read(content)
    model.flushed(model.begin_flush())
    for content in (a.data, b.data):
        model.check_crash(content)
    with pytest.raises(ModelError):
        model.check_crash(bytes(SECTOR))


def test_model_patches_sectors_changed_in_part() -> None:
    model = ModelDisk(2 * SECTOR, stamps(2, 0, 2 * SECTOR))
    write = model.issue("write", 100, 600)
    model.complete(write)
    content = bytearray(stamps(2, 0, 2 * SECTOR))
    content[100:700] = write.data
    model.check_read(content)
    assert model.expected() == bytes(content)
    zero = model.issue("zero", 0, 101)
    model.complete(zero)
    content[:101] = bytes(101)
    model.check_read(content)
