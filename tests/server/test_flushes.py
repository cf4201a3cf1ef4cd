"""One flush for all that ask while nothing changes; never for what was completed after it began."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Coroutine
from typing import Any

import pytest

from nbdserve.server.flushes import Asked, Flushes


class Disk:
    """A node whose flushes end when they are let go."""

    def __init__(self) -> None:
        self.changes = 1
        self.begun: list[int] = []
        self.ends: list[asyncio.Future[None]] = []

    async def flush(self) -> None:
        self.begun.append(self.changes)
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ends.append(end)
        await end


class Asker:
    def __init__(self) -> None:
        self.disk = Disk()
        self.tasks: list[asyncio.Task[None]] = []
        self.replies: list[tuple[list[Asked], Exception | None]] = []
        self.flushes = Flushes(self.disk, self.begin, lambda asked, error: self.replies.append((asked, error)))  # type: ignore[arg-type]

    def begin(self, work: Coroutine[Any, Any, None], length: int) -> None:
        assert length == 0
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    async def end(self, number: int, error: Exception | None = None) -> None:
        if error is None:
            self.disk.ends[number].set_result(None)
        else:
            self.disk.ends[number].set_exception(error)
        await self.tasks[number]


async def turn() -> None:
    await asyncio.sleep(0)


@pytest.mark.parametrize("error", [None, OSError(errno.EIO, "lost")])
async def test_those_between_which_nothing_changes_share_one(error: Exception | None) -> None:
    asker = Asker()
    asker.flushes.ask(1, 10)
    asker.flushes.ask(2, 20)  # before the task has had its turn
    await turn()
    asker.flushes.ask(3, 30)
    assert (len(asker.tasks), asker.flushes.joined) == (1, 2)
    assert not asker.replies
    await asker.end(0, error)
    assert asker.replies == [([(1, 10), (2, 20), (3, 30)], error)]
    assert asker.flushes.joined == 0


async def test_what_was_completed_after_one_began_has_another() -> None:
    asker = Asker()
    asker.flushes.ask(1, 0)
    await turn()
    asker.disk.changes += 1
    asker.flushes.ask(2, 0)
    asker.flushes.ask(3, 0)
    await turn()
    assert asker.disk.begun == [1, 2]
    await asker.end(0)
    assert [asked for asked, _ in asker.replies] == [[(1, 0)]]
    asker.flushes.ask(4, 0)
    assert (len(asker.tasks), asker.flushes.joined) == (2, 2)
    await asker.end(1)
    assert [asked for asked, _ in asker.replies] == [[(1, 0)], [(2, 0), (3, 0), (4, 0)]]


async def test_one_that_has_ended_is_joined_by_nobody() -> None:
    """The disk may have failed to become stable: whether it is is the node's to say."""
    asker = Asker()
    asker.flushes.ask(1, 0)
    await turn()
    await asker.end(0, OSError(errno.EIO, "lost"))
    asker.flushes.ask(2, 0)
    await turn()
    assert asker.disk.begun == [1, 1]
    await asker.end(1)
    assert [asked for asked, _ in asker.replies] == [[(1, 0)], [(2, 0)]]
