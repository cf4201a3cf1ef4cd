from __future__ import annotations

import asyncio
import sys
import threading
import time
from typing import Any

import pytest
import uvloop

from nbdserve.storage import pool as pool_module
from nbdserve.storage.pool import MAX_THREADS, WorkerPool, worker_pool


async def test_run_returns_and_raises() -> None:
    pool = worker_pool()
    assert await pool.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await pool.run(divmod, 7, 0)


async def test_jobs_run_on_other_threads_and_completions_on_the_loop() -> None:
    done: asyncio.Future[tuple[Any, threading.Thread]] = asyncio.get_running_loop().create_future()
    worker_pool().submit(
        threading.current_thread, (), lambda result, error: done.set_result((result, threading.current_thread()))
    )
    worker, completer = await done
    assert worker is not threading.current_thread()
    assert completer is threading.current_thread()


async def test_threads_are_started_as_needed_and_bounded() -> None:
    pool = WorkerPool(asyncio.get_running_loop(), max_threads=3)
    await pool.run(lambda: None)
    assert len(pool._threads) == 1
    await asyncio.gather(*(pool.run(time.sleep, 0.01) for _ in range(20)))
    threads = list(pool._threads)
    assert len(threads) == 3
    assert all(thread.is_alive() for thread in threads)
    await pool.close()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


async def test_a_blocked_thread_does_not_hold_up_the_others() -> None:
    pool = worker_pool()
    release = threading.Event()
    stuck = [asyncio.create_task(pool.run(release.wait, 60)) for _ in range(MAX_THREADS - 1)]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(pool.run(lambda: 5), 30) == 5
    release.set()
    await asyncio.gather(*stuck)


async def test_every_completion_arrives() -> None:
    pool = worker_pool()
    results = await asyncio.gather(*(pool.run(lambda number: number, number) for number in range(5000)))
    assert results == list(range(5000))


async def test_a_cancelled_await_returns_when_the_job_has_ended() -> None:
    pool = worker_pool()
    started, release, ended = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        started.set()
        release.wait(60)
        ended.set()

    task = asyncio.create_task(pool.run(job))
    while not started.is_set():
        await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_cancelled_before_the_job_started() -> None:
    pool = WorkerPool(asyncio.get_running_loop(), max_threads=1)
    release, ran = threading.Event(), threading.Event()
    blocking = asyncio.create_task(pool.run(release.wait, 60))
    await asyncio.sleep(0)
    queued = asyncio.create_task(pool.run(ran.set))
    await asyncio.sleep(0)
    queued.cancel()
    await asyncio.sleep(0.01)
    assert not queued.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await queued
    assert ran.is_set()
    await blocking
    await pool.close()


async def test_timeout_and_errors_of_cancelled_jobs_leave_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        time.sleep(0.02)
        raise OSError(5, "broken")

    with pytest.raises((TimeoutError, OSError)):
        await asyncio.wait_for(worker_pool().run(fail), 0.001)
    assert not caplog.records


async def test_an_error_in_a_completion_spares_the_others() -> None:
    loop = asyncio.get_running_loop()
    reported: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reported.append(context))
    pool = worker_pool()

    def completion(result: Any, error: BaseException | None) -> None:
        raise ValueError("bad completion")

    pool.submit(int, (), completion)
    assert await pool.run(lambda: 1) == 1
    while not reported:
        await asyncio.sleep(0.001)
    assert isinstance(reported[0]["exception"], ValueError)


async def test_close_waits_for_jobs_and_refuses_more() -> None:
    pool = WorkerPool(asyncio.get_running_loop())
    ended: list[int] = []
    for _ in range(10):
        pool.submit(time.sleep, (0.01,), lambda *_: ended.append(1))
    await pool.close()
    await pool.close()
    assert len(ended) == 10
    with pytest.raises(RuntimeError, match="closed"):
        await pool.run(int)


async def test_an_idle_thread_keeps_no_buffer() -> None:
    buffer = bytearray(10)
    pool = worker_pool()
    await pool.run(len, buffer)
    await pool.run(int)
    await asyncio.sleep(0.01)
    assert sys.getrefcount(buffer) == 2


def test_one_pool_per_loop_and_closed_loops_are_forgotten() -> None:
    async def use() -> WorkerPool:
        pool = worker_pool()
        assert worker_pool() is pool
        await pool.run(int)
        return pool

    first = asyncio.run(use())
    threads = list(first._threads)
    second = uvloop.run(use())
    assert first is not second
    assert first.loop not in pool_module._pools
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_a_loop_closed_under_a_job_ends_the_thread_quietly() -> None:
    release = threading.Event()

    async def use() -> list[threading.Thread]:
        pool = worker_pool()
        pool.submit(release.wait, (60,), lambda result, error: None)
        return list(pool._threads)

    threads = asyncio.run(use())
    release.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
