"""Range locks: never two conflicting holders, first come first served, nobody lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.block.requests import RangeLock, RangeLocks


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Holders:
    """Tasks that take a lock each and hold it until told."""

    def __init__(self) -> None:
        self.locks = RangeLocks()
        self.held: list[str] = []
        self._release: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def take(self, name: str, make: Callable[[int, int], RangeLock], start: int, end: int) -> None:
        self._release[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name, make(start, end)))
        await _settle()

    async def _hold(self, name: str, lock: RangeLock) -> None:
        async with lock:
            self.held.append(name)
            try:
                await self._release[name].wait()
            finally:
                self.held.remove(name)

    async def release(self, name: str) -> None:
        self._release[name].set()
        await self.tasks.pop(name)
        await _settle()

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.tasks.pop(name)
        await _settle()


async def test_shared_locks_are_held_together() -> None:
    holders = Holders()
    await holders.take("a", holders.locks.shared, 0, 10)
    await holders.take("b", holders.locks.shared, 5, 15)
    assert holders.held == ["a", "b"]


async def test_an_exclusive_lock_waits_for_all_it_overlaps_and_for_no_other() -> None:
    holders = Holders()
    await holders.take("a", holders.locks.shared, 0, 10)
    await holders.take("b", holders.locks.shared, 10, 20)
    await holders.take("x", holders.locks.exclusive, 5, 15)
    await holders.take("apart", holders.locks.exclusive, 20, 30)
    assert holders.held == ["a", "b", "apart"]
    await holders.release("a")
    assert "x" not in holders.held
    await holders.release("b")
    assert "x" in holders.held


async def test_locks_that_only_touch_do_not_conflict() -> None:
    holders = Holders()
    await holders.take("a", holders.locks.exclusive, 0, 10)
    await holders.take("b", holders.locks.exclusive, 10, 20)
    assert holders.held == ["a", "b"]


async def test_readers_that_come_later_do_not_overtake_a_waiting_writer() -> None:
    holders = Holders()
    await holders.take("reader", holders.locks.shared, 0, 10)
    await holders.take("writer", holders.locks.exclusive, 0, 10)
    await holders.take("late", holders.locks.shared, 0, 10)
    await holders.take("elsewhere", holders.locks.shared, 10, 20)
    assert holders.held == ["reader", "elsewhere"]
    assert not holders.locks.try_acquire(holders.locks.shared(9, 10))
    await holders.release("reader")
    assert holders.held == ["elsewhere", "writer"]
    await holders.release("writer")
    assert holders.held == ["elsewhere", "late"]


async def test_writers_of_one_range_are_served_in_order() -> None:
    holders = Holders()
    names = [f"w{number}" for number in range(5)]
    for name in names:
        await holders.take(name, holders.locks.exclusive, 0, 4)
    for name in names:
        assert holders.held == [name]
        await holders.release(name)


async def test_a_cancelled_waiter_lets_those_behind_it_through() -> None:
    holders = Holders()
    await holders.take("reader", holders.locks.shared, 0, 10)
    await holders.take("writer", holders.locks.exclusive, 0, 10)
    await holders.take("late", holders.locks.shared, 0, 10)
    await holders.cancel("writer")
    assert holders.held == ["reader", "late"]


async def test_a_cancelled_holder_releases() -> None:
    holders = Holders()
    await holders.take("a", holders.locks.exclusive, 0, 10)
    await holders.take("b", holders.locks.exclusive, 0, 10)
    await holders.cancel("a")
    assert holders.held == ["b"]


async def test_a_waiter_cancelled_in_the_turn_it_is_served_gives_the_range_back() -> None:
    locks = RangeLocks()
    first = locks.exclusive(0, 10)
    assert locks.try_acquire(first)

    async def wait(lock: RangeLock) -> None:
        async with lock:
            await asyncio.Event().wait()

    second = asyncio.create_task(wait(locks.exclusive(0, 10)))
    await _settle()
    locks.release(first)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert locks.try_acquire(locks.exclusive(0, 10))


async def test_a_waiter_cancelled_before_the_release_does_not_get_the_range() -> None:
    locks = RangeLocks()
    first = locks.exclusive(0, 10)
    assert locks.try_acquire(first)
    second = asyncio.create_task(locks.acquire(locks.exclusive(0, 10)))
    third = asyncio.create_task(locks.acquire(locks.exclusive(0, 10)))
    await _settle()
    second.cancel()
    locks.release(first)
    await asyncio.wait_for(third, 60)
    assert second.cancelled() or second.cancelling()


async def test_releasing_what_is_not_held_is_an_error() -> None:
    locks = RangeLocks()
    lock = locks.shared(0, 10)
    assert locks.try_acquire(lock)
    locks.release(lock)
    with pytest.raises(KeyError):
        locks.release(lock)


@pytest.mark.parametrize(
    ("held", "asked", "blocked"),
    [("shared", False, False), ("shared", True, True), ("exclusive", False, True), ("exclusive", True, True)],
)
async def test_blocked_says_what_try_acquire_would(held: str, asked: bool, blocked: bool) -> None:
    locks = RangeLocks()
    assert not locks.blocked(0, 100, exclusive=True)
    holder = getattr(locks, held)(10, 20)
    assert locks.try_acquire(holder)
    for start, end in ((0, 11), (19, 30), (10, 20), (12, 13), (0, 100)):
        assert locks.blocked(start, end, exclusive=asked) == blocked
        other = (locks.exclusive if asked else locks.shared)(start, end)
        assert locks.try_acquire(other) != blocked
        if not blocked:
            locks.release(other)
    for start, end in ((0, 10), (20, 30)):
        assert not locks.blocked(start, end, exclusive=asked)
    locks.release(holder)
    assert not locks.blocked(0, 100, exclusive=True)


async def test_those_who_wait_block_too() -> None:
    holders = Holders()
    await holders.take("a", holders.locks.shared, 0, 10)
    await holders.take("b", holders.locks.exclusive, 5, 15)
    assert holders.held == ["a"]
    assert holders.locks.blocked(12, 13, exclusive=False), "behind b, which came first"
    assert not holders.locks.blocked(0, 5, exclusive=False)
    await holders.cancel("b")
    assert not holders.locks.blocked(12, 13, exclusive=False)
    assert holders.locks.blocked(0, 5, exclusive=True)
    await holders.release("a")
    assert not holders.locks.blocked(0, 100, exclusive=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_whatever_happens_no_two_conflicting_ranges_are_held_and_nobody_is_forgotten(seed: int) -> None:
    async def scenario() -> None:
        rng = random.Random(seed)
        locks = RangeLocks()
        held: dict[RangeLock, None] = {}
        served: list[RangeLock] = []

        async def work(lock: RangeLock) -> None:
            async with lock:
                for other in held:
                    overlap = lock.start < other.end and other.start < lock.end
                    assert not (overlap and (lock.exclusive or other.exclusive))
                held[lock] = None
                served.append(lock)
                try:
                    for _ in range(rng.randrange(4)):
                        await asyncio.sleep(0)
                finally:
                    del held[lock]

        asked: list[RangeLock] = []
        tasks: list[asyncio.Task[None]] = []
        cancelled: set[RangeLock] = set()
        for _ in range(40):
            start = rng.randrange(16)
            lock = rng.choice((locks.shared, locks.exclusive))(start, start + 1 + rng.randrange(6))
            asked.append(lock)
            tasks.append(asyncio.create_task(work(lock)))
            if rng.random() < 0.5:
                await asyncio.sleep(0)
            if rng.random() < 0.2:
                victim = rng.randrange(len(tasks))
                tasks[victim].cancel()
                cancelled.add(asked[victim])
        for result in await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60):
            assert result is None or isinstance(result, asyncio.CancelledError)
        # Served in order of arrival among those that conflict.
        order = {lock: number for number, lock in enumerate(asked)}
        for number, lock in enumerate(served):
            assert all(order[lock] < order[later] for later in served[number + 1 :] if lock.conflicts(later))
        assert {*served} | cancelled >= {*asked}
        assert locks.try_acquire(locks.exclusive(0, 100))

    asyncio.run(scenario())
