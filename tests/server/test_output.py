"""The sending side: order, partial sends, and what becomes of memory that waits."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator

import pytest

from nbdserve.buffers import ReusedBuffer
from nbdserve.server.budget import Budget
from nbdserve.server.output import Output
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB
from tests.server.clients import read_exactly


class Pair:
    """An output into a narrow socket, and the other end of it."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for sock in (ours, self.peer):
            sock.setblocking(False)
        self.drained = 0
        self.errors: list[OSError] = []
        self.budget = Budget()
        self.output = Output(ours, asyncio.get_running_loop(), self._on_drained, self.errors.append, self.budget)

    def _on_drained(self) -> None:
        self.drained += 1

    async def read(self, length: int) -> bytes:
        return await read_exactly(self.peer, length)


@pytest.fixture
async def pair() -> Iterator[Pair]:  # type: ignore[misc]
    made = Pair()
    yield made
    made.output.close()
    made.peer.close()


def _pattern(length: int, seed: int = 1) -> bytes:
    return bytes((position * 7 + seed) % 251 for position in range(length))


async def test_what_the_socket_takes_leaves_nothing_behind(pair: Pair) -> None:
    pair.output.send(b"hello")
    assert pair.output.backlog == 0
    assert await pair.read(5) == b"hello"
    assert pair.drained == 0


async def test_bytes_arrive_in_order_whatever_way_they_were_sent(pair: Pair) -> None:
    scratch = ReusedBuffer(256 * KIB)
    released: list[int] = []
    expected = b""
    for number in range(30):
        length = (1, 100, 5000, 70_000, 200_000)[number % 5]
        data = _pattern(length, number)
        expected += data
        if number % 4 == 0:
            buffer = bytearray(data)
            pair.output.send(memoryview(buffer))
            buffer[:] = bytes(length)
        elif number % 4 == 1:
            scratch.view[:length] = data
            pair.output.send_scratch(scratch, length)
            scratch.view[:] = bytes(len(scratch.view))
        elif number % 4 == 2:
            pair.output.send_owned(memoryview(data), lambda number=number: released.append(number))  # type: ignore[misc]
        else:
            pair.output.send(data)
    assert pair.output.backlog > 0
    assert await pair.read(len(expected)) == expected
    await asyncio.sleep(0.01)
    assert pair.output.backlog == 0
    assert pair.drained == 1
    assert released == [number for number in range(30) if number % 4 == 2]


async def test_owned_memory_is_released_once_and_only_when_it_is_sent(pair: Pair) -> None:
    released: list[str] = []
    pair.output.send_owned(memoryview(b"small"), lambda: released.append("small"))
    assert released == ["small"]
    large = _pattern(300_000)
    pair.output.send_owned(memoryview(large), lambda: released.append("large"))
    assert released == ["small"]
    assert await pair.read(5 + len(large)) == b"small" + large
    await asyncio.sleep(0.01)
    assert released == ["small", "large"]


async def test_a_scratch_buffer_that_waits_changes_hands_and_comes_back(pair: Pair) -> None:
    scratch = ReusedBuffer(256 * KIB)
    first = scratch.data
    pair.output.send_scratch(scratch, 256 * KIB)
    assert scratch.data is not first
    await pair.read(256 * KIB)
    await asyncio.sleep(0.01)
    assert scratch.detach() is not first
    assert scratch.data is first, "recycled"


@pytest.mark.parametrize("closed_by", ["close", "peer"])
async def test_what_waits_is_released_when_the_connection_ends(pair: Pair, closed_by: str) -> None:
    released: list[int] = []
    for number in range(3):
        pair.output.send_owned(memoryview(bytes(100_000)), lambda number=number: released.append(number))  # type: ignore[misc]
    if closed_by == "close":
        pair.output.close()
    else:
        pair.peer.close()
        async with asyncio.timeout(60):
            while not pair.errors:
                await asyncio.sleep(0)
        assert len(pair.errors) == 1
    assert sorted(released) == [0, 1, 2]
    assert pair.output.backlog == 0
    assert pair.output.closed
    pair.output.close()


async def test_sending_to_a_peer_that_is_gone_is_reported_once(pair: Pair) -> None:
    pair.peer.close()
    released: list[bool] = []
    for _ in range(3):
        pair.output.send(b"x")
    pair.output.send_owned(memoryview(b"y"), lambda: released.append(True))
    pair.output.send_scratch(ReusedBuffer(16), 16)
    assert len(pair.errors) == 1
    assert released == [True]
    assert pair.drained == 0


# --- straight from a storage -----------------------------------------------------------------------------------------


class Sendable(MemoryStorage):
    """A storage that can be sent from, as far as it is cached."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.content = content
        self.cached = True
        self.reads = 0
        self.most = 1 << 30
        self.error: OSError | None = None

    def can_send(self, offset: int, length: int) -> bool:
        return self.cached

    def send(self, sock_fd: int, offset: int, length: int) -> int:
        if self.error is not None:
            raise self.error
        piece = self.content[offset : offset + min(length, self.most)]
        if not piece:
            raise OSError(errno.EIO, "the file ends here")
        sock = socket.socket(fileno=sock_fd)
        try:
            return sock.send(piece)
        except BlockingIOError:
            return 0
        finally:
            sock.detach()

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        await asyncio.sleep(0.01)
        if self.error is not None:
            raise self.error
        await super().read_into(offset, buffer)


async def test_a_file_range_follows_its_head_and_precedes_what_is_sent_after(pair: Pair) -> None:
    storage = Sendable(_pattern(200_000))
    head = bytearray(b"head")
    expected = b""
    for number in range(5):
        pair.output.send_file(memoryview(head), storage, 1000 * number, 90_000)
        head[:] = b"HEAD" if number % 2 else b"head"
        pair.output.send(b"tail")
        expected += (b"HEAD" if number and number % 2 == 0 else b"head") + storage.content[1000 * number :][:90_000]
        expected += b"tail"
    assert pair.output.backlog > 0
    assert await pair.read(len(expected)) == expected
    await asyncio.sleep(0.01)
    assert pair.output.backlog == 0
    assert storage.reads == 0


async def test_pages_that_left_the_cache_meanwhile_are_read_by_a_task(pair: Pair) -> None:
    storage = Sendable(_pattern(200_000))
    storage.most = 3000
    pair.output.send_file(memoryview(b"head"), storage, 0, 200_000)
    pair.output.send(b"tail")
    storage.cached = False
    assert await pair.read(200_008) == b"head" + storage.content + b"tail"
    await asyncio.sleep(0.01)
    assert storage.reads == 1
    assert pair.drained == 1


@pytest.mark.parametrize("when", ["at once", "later", "while it is read"])
async def test_a_range_that_cannot_be_read_ends_the_connection(pair: Pair, when: str) -> None:
    storage = Sendable(_pattern(200_000))
    if when == "at once":
        storage.error = OSError(5, "gone")
    pair.output.send_file(memoryview(b"head"), storage, 0, 200_000)
    storage.error = OSError(5, "gone")
    storage.cached = when != "while it is read"
    with pytest.raises(ConnectionResetError):
        await pair.read(200_004)
    assert [error.errno for error in pair.errors] == [5]
    assert pair.output.closed


async def test_closing_while_pages_are_read_is_quiet(pair: Pair) -> None:
    storage = Sendable(_pattern(200_000))
    pair.output.send_file(memoryview(b"head"), storage, 0, 200_000)
    storage.cached = False
    peer_read = asyncio.create_task(pair.read(150_000))
    async with asyncio.timeout(60):
        while not storage.reads:
            await asyncio.sleep(0)
    pair.output.close()
    await asyncio.sleep(0.05)
    assert pair.errors == []
    assert pair.drained == 0
    with pytest.raises(ConnectionResetError):
        await peer_read


async def test_a_file_that_has_become_shorter_ends_the_connection(pair: Pair) -> None:
    storage = Sendable(_pattern(100_000))
    pair.output.send_file(memoryview(b"head"), storage, 0, 200_000)
    with pytest.raises(ConnectionResetError):
        await pair.read(200_004)
    assert [error.errno for error in pair.errors] == [errno.EIO]
