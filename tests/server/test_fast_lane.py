"""The fast lane answers exactly what the session would, and leaves everything else where it is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from nbdserve.block.node import Node
from nbdserve.buffers import ReusedBuffer
from nbdserve.errors import RequestError
from nbdserve.formats.raw import RawDriver
from nbdserve.protocol.codec import EXTENDED, EXTENDED_REQUEST, REQUEST, SIMPLE, STRUCTURED, final_reply
from nbdserve.protocol.constants import (
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FUA,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    EXTENDED_REQUEST_MAGIC,
    REQUEST_MAGIC,
)
from nbdserve.protocol.transmission import RECEIVE_SIZE, RequestParser, pack_read_head, read_head_size
from nbdserve.protocol.validate import RequestRules
from nbdserve.server.fast_lane import SEND_FILE_FROM, FastLane
from nbdserve.server.replies import SCRATCH_SIZE, SEND_AT, Replies
from nbdserve.storage.memory import MemoryStorage
from tests.block.layers import overlay
from tests.server.clients import Gated
from tests.server.test_replies import Sent

SIZE = 1 << 20
MODES = pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED], ids=["simple", "structured", "extended"])


class Lane:
    """A fast lane whose client and socket are lists of bytes."""

    def __init__(self, node: Node, mode: int = STRUCTURED, *, writable: bool = True) -> None:
        self.mode = mode
        self.sent = Sent()
        self.received = ReusedBuffer(RECEIVE_SIZE)
        rules = RequestRules(node.size, 0xFFFF if writable else 0xFFFF | 2, mode, False)
        self.parser = RequestParser(rules, mode, self.received)
        self.replies = Replies(ReusedBuffer(SCRATCH_SIZE), self.sent)  # type: ignore[arg-type]
        self.lane = FastLane(
            node,
            self.parser,
            self.received,
            self.replies,
            self.sent,  # type: ignore[arg-type]
            mode,
            node.size,
            writable=writable,
            taken=self._take,
            written=lambda *ended: self.ended.append(ended),
        )
        self.room = 100
        self.taken: list[int] = []
        self.ended: list[tuple[object, ...]] = []

    def _take(self, length: int) -> bool:
        self.taken.append(length)
        return len(self.taken) < self.room

    def request(self, kind: int, cookie: int, offset: int, length: int, *, flags: int = 0, data: bytes = b"") -> bytes:
        if self.mode == EXTENDED:
            flags |= CMD_FLAG_PAYLOAD_LEN if kind == CMD_WRITE else 0
            return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, kind, cookie, offset, length) + data
        return REQUEST.pack(REQUEST_MAGIC, flags, kind, cookie, offset, length) + data

    def run(self, *requests: bytes) -> bool:
        self.parser.feed(b"".join(requests))
        return self.lane.run()

    def answers(self) -> bytes:
        self.replies.send()
        return b"".join(self.sent.sends)

    def read_reply(self, cookie: int, offset: int, content: bytes) -> bytes:
        size = read_head_size(self.mode)
        head = bytearray(size)
        pack_read_head(self.mode)(head, 0, cookie, offset, len(content))
        return bytes(head) + content


def _raw(content: bytes) -> Node:
    storage = MemoryStorage(content)
    return Node([RawDriver(storage, 0, storage.size, read_only=False)])


@MODES
async def test_reads_and_writes_are_answered_in_order(mode: int) -> None:
    rng = random.Random(mode)
    model = bytearray(rng.randbytes(SIZE))
    node = _raw(bytes(model))
    lane = Lane(node, mode)
    expected = b""
    for cookie in range(300):
        length = rng.choice((1, 511, 512, 4096, 20_000))
        offset = rng.randrange(SIZE - length + 1)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            model[offset : offset + length] = data
            assert lane.run(lane.request(CMD_WRITE, cookie, offset, length, data=data))
            expected += final_reply(mode, cookie, offset)
        else:
            assert lane.run(lane.request(CMD_READ, cookie, offset, length))
            expected += lane.read_reply(cookie, offset, bytes(model[offset : offset + length]))
    assert lane.answers() == expected
    assert await node.read(0, SIZE) == model


Make = Callable[[Lane], bytes]


@MODES
@pytest.mark.parametrize(
    "other",
    [
        lambda lane: lane.request(CMD_FLUSH, 9, 0, 0),
        lambda lane: lane.request(CMD_DISC, 9, 0, 0),
        lambda lane: lane.request(CMD_READ, 9, 0, 0),
        lambda lane: lane.request(CMD_READ, 9, SIZE - 511, 512),
        lambda lane: lane.request(CMD_READ, 9, (1 << 64) - 1, 1),
        lambda lane: lane.request(CMD_READ, 9, 0, 512, flags=CMD_FLAG_DF),
        lambda lane: lane.request(CMD_READ, 9, 0, SEND_FILE_FROM),
        lambda lane: lane.request(CMD_WRITE, 9, 0, 1, flags=CMD_FLAG_FUA, data=b"x"),
        lambda lane: lane.request(CMD_WRITE, 9, SIZE, 1, data=b"x"),
        lambda lane: lane.request(CMD_WRITE, 9, 0, 100, data=b"x" * 99),
        lambda lane: lane.request(CMD_READ, 9, 0, 512)[:-1],
        lambda lane: b"\0" * 40,
    ],
    ids=(
        "flush disc nothing end wrap flagged long fua past cut-payload cut-request garbage".split()  # noqa: SIM905
    ),
)
async def test_what_is_not_plain_is_left_alone(mode: int, other: Make) -> None:
    node = _raw(bytes(range(256)) * (SIZE // 256))
    lane = Lane(node, mode)
    plain = lane.request(CMD_READ, 1, 512, 3)
    assert not lane.run(plain, other(lane))
    assert lane.answers() == lane.read_reply(1, 512, b"\0\1\2")
    assert lane.parser.unparsed() == (len(plain), len(plain) + len(other(lane)))
    assert await node.read(0, 1) == b"\0"
    assert not lane.lane.run(), "it is still no plain request"


async def test_a_read_only_client_writes_nothing() -> None:
    node = _raw(bytes(SIZE))
    lane = Lane(node, writable=False)
    assert not lane.run(lane.request(CMD_WRITE, 1, 0, 3, data=b"abc"))
    assert not lane.answers()
    assert await node.read(0, 3) == bytes(3)


async def test_what_has_to_wait_is_left_alone() -> None:
    node = await overlay(None, SIZE)
    lane = Lane(node)
    for request in (
        lane.request(CMD_READ, 1, 0, 512),
        lane.request(CMD_WRITE, 2, 0, 3, data=b"abc"),
    ):
        assert not lane.run(request)
        assert lane.parser.unparsed()[0] == 0
    assert not lane.answers()


async def test_writes_that_are_taken_are_counted_and_end_later() -> None:
    storage = Gated(bytes(SIZE))
    node = Node([RawDriver(storage, 0, SIZE, read_only=False)])
    lane = Lane(node)
    assert lane.run(*(lane.request(CMD_WRITE, cookie, 512 * cookie, 3, data=b"abc") for cookie in range(3)))
    assert not lane.answers()
    assert lane.taken == [3, 3, 3]
    await asyncio.wait_for(node.flush(), 60)
    while len(lane.ended) < 3:
        await asyncio.sleep(0)
    assert sorted(lane.ended) == [(cookie, 512 * cookie, 3, None) for cookie in range(3)]
    assert await node.read(1024, 3) == b"abc"


async def test_no_more_is_taken_than_there_is_room_for() -> None:
    node = Node([RawDriver(Gated(bytes(SIZE)), 0, SIZE, read_only=False)])
    lane = Lane(node)
    lane.room = 2
    assert not lane.run(*(lane.request(CMD_WRITE, cookie, 512 * cookie, 3, data=b"abc") for cookie in range(3)))
    assert lane.taken == [3, 3]
    while len(lane.ended) < 2:
        await asyncio.sleep(0)


async def test_a_corrupt_mapping_is_left_to_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    node = _raw(bytes(SIZE))

    def corrupt(offset: int, buffer: memoryview) -> int:
        raise RequestError(5, "corrupt")

    monkeypatch.setattr(node, "try_read_into", corrupt)
    lane = Lane(node)
    assert not lane.run(lane.request(CMD_READ, 1, 0, 512))
    assert lane.parser.unparsed()[0] == 0


async def test_long_batches_leave_in_parts() -> None:
    node = _raw(bytes(SIZE))
    lane = Lane(node)
    count = 2 * SEND_AT // 4096
    assert lane.run(*(lane.request(CMD_READ, cookie, 0, 4096) for cookie in range(count)))
    assert len(lane.sent.sends) >= 1
    assert len(lane.answers()) == count * (4096 + read_head_size(STRUCTURED))


async def test_a_full_socket_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    node = _raw(bytes(SIZE))
    lane = Lane(node)
    lane.sent.backlog = 1
    requests = [lane.request(CMD_READ, cookie, 0, 4096) for cookie in range(2 * SEND_AT // 4096)]
    assert not lane.run(*requests)
    assert len(lane.sent.sends) == 1
    position, end = lane.parser.unparsed()
    assert 0 < position < end
