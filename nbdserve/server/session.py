"""The transmission phase of one client: requests become work on the node, work becomes replies.

What the tables and the page cache answer at once is answered in ``process``, a whole batch with one send. Everything
else becomes a task, and replies leave in the order in which the tasks finish.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Final

from nbdserve.block.forms import READ_DATA, READ_SPLIT, READ_WAIT, READ_ZERO
from nbdserve.block.gathering import GatheringNode
from nbdserve.block.node import Node
from nbdserve.block.pieces import Piece, zero_pieces
from nbdserve.block.writer import WRITE_DONE, WRITE_TAKEN, WRITE_WAIT
from nbdserve.errors import ProtocolError, RequestError, errno_of
from nbdserve.exports.export import Export
from nbdserve.protocol.codec import SIMPLE, final_reply, hole_chunk, wire_error
from nbdserve.protocol.constants import (
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    COMMAND_NAMES,
    EXPORT_READ_ONLY,
    REPLY_FLAG_DONE,
)
from nbdserve.protocol.handshake import Negotiated
from nbdserve.protocol.transmission import Request, RequestParser, pack_read_head, read_head_size
from nbdserve.protocol.validate import RequestRules
from nbdserve.server.block_status import status_reply
from nbdserve.server.budget import SMALL
from nbdserve.server.fast_lane import SEND_FILE_FROM, FastLane
from nbdserve.server.flushes import Asked, Flushes
from nbdserve.server.output import Output
from nbdserve.server.payloads import Buffers, Payloads
from nbdserve.server.replies import SCRATCH_SIZE, SEND_AT, GatheringReplies, Replies, read_chunks
from nbdserve.units import KIB, MIB

log = logging.getLogger(__name__)

MAX_IN_FLIGHT: Final = 64
"""Requests of one client that wait for the disk at a time; further ones wait in the socket."""
MAX_IN_FLIGHT_BYTES: Final = 48 * MIB
"""A client that takes no reply costs this and a little more, below 64 MiB in all."""

_MAX_CACHED: Final = 256 * MIB
"""Read for one CACHE, a hint: without this 28 bytes from a client that then leaves keep a disk busy for hours."""


class Session:
    """One client and one export.

    ``on_idle`` is called when nothing is in flight after ``finish``; ``on_error`` with what ``process`` would raise,
    when it is met while work ends (ProtocolError: the connection is to be dropped).
    """

    def __init__(
        self,
        export: Export,
        negotiated: Negotiated,
        output: Output,
        buffers: Buffers,
        *,
        set_reading: Callable[[bool], None],
        on_idle: Callable[[], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self.export = export
        self.node: Node = export.node
        self.mode = negotiated.mode
        self.contexts = negotiated.contexts
        self.size = export.size
        self.draining = False
        """The server shuts down: new requests are answered ESHUTDOWN."""
        self._output = output
        self._buffers = buffers
        self._budget = buffers.budget
        self._payloads = Payloads(buffers, self.resume)
        self._moved: int | None = None
        self._scratch = buffers.scratch
        gathering = GatheringNode.of(self.node)
        self._ready = (
            GatheringReplies(buffers.scratch, output, gathering, self._send_written)
            if gathering
            else Replies(buffers.scratch, output)
        )
        self._set_reading = set_reading
        self._on_idle = on_idle
        self._on_error = on_error
        self.rules = RequestRules(self.size, negotiated.flags, self.mode, bool(self.contexts))
        self.parser = RequestParser(self.rules, self.mode, buffers.receive, self._payloads.take)
        self._head_size = read_head_size(self.mode)
        self._pack_head = pack_read_head(self.mode)
        self._fast_lane = FastLane(
            gathering or self.node,
            self.parser,
            buffers.receive,
            self._ready,
            output,
            self.mode,
            self.size,
            writable=not negotiated.flags & EXPORT_READ_ONLY,
            taken=self._taken,
            written=self._written,
        )
        self._flushes = Flushes(self.node, self._begin, self._reply_flushed)
        self._todo: list[Request] = []
        self._replies: list[bytes] = []
        self._in_flight = 0
        self._in_flight_bytes = 0
        self.tasks: set[asyncio.Task[None]] = set()  # of requests that have to wait for something
        self.reading = True
        self._finished = False
        self._slow: dict[int, Callable[..., Coroutine[Any, Any, None]]] = {
            CMD_TRIM: self._trim,
            CMD_CACHE: self._cache,
            CMD_WRITE_ZEROES: self._write_zeroes,
        }

    # --- the event-loop side ---------------------------------------------------------------------------------------

    def process(self) -> None:
        """Answer the requests received, as far as their replies and the work in flight find room."""
        parser, output = self.parser, self._output
        requests = iter(self._todo)
        self._todo = []
        while True:
            for request in requests:
                error, kind, flags, cookie, offset, length, _ = request
                if kind == CMD_READ and length and not error and not self.draining:
                    self._read(flags, cookie, offset, length)
                else:
                    self._dispatch(*request)
                if output.backlog or self._is_full():
                    self._stop(requests)
                    return
            if not self.draining:
                done = self._fast_lane.run()
                if output.backlog or self._is_full():
                    self._stop(iter(()))
                    return
                if done:
                    break
            try:
                batch = parser.next_batch()
            except ProtocolError:
                self._ready.send()  # what came before is answered
                raise
            if not batch:
                if self._payloads.waiting:
                    self._stop(iter(()))
                    return
                break
            requests = iter(batch)
        self._ready.send()
        if parser.disconnected:
            self._set_reading(False)
            self.finish()
        elif not self.reading:
            self.reading = True
            self._set_reading(True)

    def _is_full(self) -> bool:
        """As much is in flight as one client may have; where all of them have too much, one request."""
        return self._in_flight > 0 and (
            self._in_flight + self._flushes.joined >= MAX_IN_FLIGHT
            or self._in_flight_bytes >= MAX_IN_FLIGHT_BYTES
            or self._budget.used >= self._budget.limit
        )

    def _stop(self, requests: Iterator[Request]) -> None:
        """No room for more: keep what is not answered, and take nothing more from the socket."""
        self._todo = [
            (*request[:6], None if request[6] is None else self._payloads.keep(request[6])) for request in requests
        ]
        self.parser.save()
        self._ready.send()
        if self.reading:
            self.reading = False
            self._set_reading(False)

    def resume(self) -> None:
        """Room may have come free: go on where ``process`` stopped."""
        # While draining, what waited for room is answered too: ESHUTDOWN.
        if not self.reading and not self._output.backlog and (self.draining or not self._finished):
            try:
                self.parser.reload()
                self.process()
            except Exception as error:
                self._on_error(error)
                return
        self._check_idle()

    def lost(self) -> None:
        """The client is gone: nothing more is received, and nobody waits for replies."""
        self._payloads.withdraw()
        for payload in (self.parser.collecting, *(request[6] for request in self._todo)):
            if payload is not None:
                self._payloads.give(payload)
        self.parser.abandon()
        self._todo = []
        self.finish()

    def is_idling(self, least: int) -> bool:
        """Whether the client holds memory, did so when this was last asked, and has moved less than ``least`` bytes."""
        before, self._moved = self._moved, None
        if self._output.backlog > SMALL or self.parser.collecting is not None:
            self._moved = self.parser.collected + self._output.delivered()
        return before is not None and self._moved is not None and self._moved - before < least

    def finish(self) -> None:
        """The client sends nothing more (DISC, end of stream, shutdown): ``on_idle`` follows when its work is done."""
        self._finished = True
        self._check_idle()

    def _check_idle(self) -> None:
        if self._finished and not self._in_flight and not self._replies and not self._output.backlog:
            self._on_idle()

    def _dispatch(
        self, error: int, kind: int, flags: int, cookie: int, offset: int, length: int, payload: memoryview | None
    ) -> None:
        if error or self.draining:
            if payload is not None:
                self._payloads.give(payload)
            if kind != CMD_DISC:
                self._refuse(error or errno.ESHUTDOWN, kind, cookie, offset, length)
        elif kind == CMD_READ:  # of nothing: drivers are asked for one byte at least
            self._ready.append(final_reply(self.mode, cookie, offset))
        elif kind == CMD_WRITE:
            assert payload is not None
            self._write(flags, cookie, offset, payload)
        elif kind == CMD_FLUSH and self.node.is_stable:
            self._ready.append(final_reply(self.mode, cookie, offset))
        elif kind == CMD_FLUSH:
            self._flushes.ask(cookie, offset)
        elif kind in self._slow:
            self._begin(self._answer(self._slow[kind], flags, cookie, offset, length), 0)
        elif kind != CMD_DISC:
            content = None if payload is None else bytes(payload)
            if payload is not None:
                self._payloads.give(payload)
            self._begin(self._block_status(flags, cookie, offset, length, content), 0)

    def _refuse(self, error: int, kind: int, cookie: int, offset: int, length: int) -> None:
        name = COMMAND_NAMES[kind] if kind < len(COMMAND_NAMES) else f"command {kind}"
        text = f"{name} of {length} bytes at {offset} refused: export {self.export.name!r} has {self.size} bytes"
        self._ready.append(final_reply(self.mode, cookie, offset, wire_error(error), text))

    # --- reads -----------------------------------------------------------------------------------------------------

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if length >= SEND_FILE_FROM and self._try_send_file(cookie, offset, length):
            return
        start = self._ready.position + self._head_size
        end = start + length
        if end > SCRATCH_SIZE:
            self._ready.send()
            start = self._head_size
            end = start + length
            if end > SCRATCH_SIZE:
                self._begin(self._read_slowly(flags, cookie, offset, length), length)
                return
        view = self._scratch.view[start:end]
        try:
            outcome = self.node.try_read_into(offset, view)
        except RequestError:
            outcome = READ_WAIT  # a corrupt mapping: the task meets it again and replies
        if outcome == READ_DATA:
            self._pack_head(self._scratch.data, start - self._head_size, cookie, offset, length)
            self._ready.position = end
            if end >= SEND_AT:
                self._ready.send()
        elif outcome == READ_ZERO:
            self._reply_pieces(flags, cookie, offset, view, [(True, length)])
        elif outcome == READ_SPLIT and (pieces := self._try_read_pieces(offset, view)) is not None:
            self._reply_pieces(flags, cookie, offset, view, pieces)
        else:
            self._begin(self._read_slowly(flags, cookie, offset, length), length)

    def _try_send_file(self, cookie: int, offset: int, length: int) -> bool:
        """Reply from the page cache without a copy: 20 us for 256 KiB, where reading and sending them takes 70."""
        if self._ready.position + self._head_size > SCRATCH_SIZE:
            self._ready.send()
        try:
            place = self.node.locate_read(offset, length)
        except RequestError:
            return False
        if place is None or not place[0].can_send(place[1], length):
            return False
        start = self._ready.finish()
        end = start + self._head_size
        self._pack_head(self._scratch.data, start, cookie, offset, length)
        self._output.send_file(self._scratch.view[:end], *place, length)
        return True

    def _try_read_pieces(self, offset: int, view: memoryview) -> list[Piece] | None:
        try:
            return self.node.try_read_pieces(offset, view)
        except RequestError:
            return None

    def _reply_pieces(self, flags: int, cookie: int, offset: int, view: memoryview, pieces: list[Piece]) -> None:
        """Reply to a read whose data is already in place in the scratch buffer, but for its zeroes."""
        length = len(view)
        if self.mode == SIMPLE or (len(pieces) > 1 and (flags & CMD_FLAG_DF or length <= 16 * KIB)):
            # A few sectors of zeroes cost less as bytes than as chunks of their own.
            zero_pieces(view, pieces)
            self._pack_head(self._scratch.data, self._ready.position, cookie, offset, length)
            self._ready.position += self._head_size + length
        elif len(pieces) == 1 and not pieces[0][0]:
            self._pack_head(self._scratch.data, self._ready.position, cookie, offset, length)
            self._ready.position += self._head_size + length
        elif len(pieces) == 1:
            self._ready.append(hole_chunk(self.mode, REPLY_FLAG_DONE, cookie, offset, offset, length))
        else:
            for chunk in [bytes(chunk) for chunk in read_chunks(self.mode, cookie, offset, view, pieces)]:
                self._ready.append(chunk)

    async def _read_slowly(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if not self._budget.take(length):
            await self._budget.wait(length)
        try:
            if not self._output.closed:
                await self._read_into_own(flags, cookie, offset, length)
        finally:
            self._budget.give(length)

    async def _read_into_own(self, flags: int, cookie: int, offset: int, length: int) -> None:
        head, pool = self._head_size, self._buffers.pool
        data = pool.take(head + length)
        view = memoryview(data)[head : head + length]
        try:
            pieces = await self.node.read_pieces(offset, view)
        except Exception as error:
            self._reply_failure("READ", cookie, offset, length, error)
            pool.give(data)
            return
        if len(pieces) == 1 and pieces[0][0] and self.mode != SIMPLE:
            self._output.send(hole_chunk(self.mode, REPLY_FLAG_DONE, cookie, offset, offset, length))
            pool.give(data)
        elif len(pieces) == 1 or self.mode == SIMPLE or flags & CMD_FLAG_DF:
            zero_pieces(view, pieces)
            self._pack_head(data, 0, cookie, offset, length)
            self._output.send_owned(memoryview(data)[: head + length], lambda: pool.give(data))
        else:
            for chunk in read_chunks(self.mode, cookie, offset, view, pieces):
                self._output.send(chunk)
            pool.give(data)

    # --- writes ----------------------------------------------------------------------------------------------------

    def _write(self, flags: int, cookie: int, offset: int, payload: memoryview) -> None:
        length = len(payload)
        if length and not flags & CMD_FLAG_FUA:
            outcome = self.node.submit_write(offset, payload, partial(self._written, cookie, offset, length))
            if outcome == WRITE_DONE:
                self._ready.append(final_reply(self.mode, cookie, offset))
            elif outcome == WRITE_TAKEN:
                self._taken(length)
            if outcome != WRITE_WAIT:
                self._payloads.give(payload)
                return
        self._begin(self._write_slowly(flags, cookie, offset, self._payloads.keep(payload)), length)

    def _taken(self, length: int) -> bool:
        """A submitted write is under way; whether there is room for another."""
        self._in_flight += 1
        self._in_flight_bytes += length
        self._budget.used += length
        return not self._is_full()

    def _written(self, cookie: int, offset: int, length: int, error: Exception | None) -> None:
        """A submitted write is complete; the replies of a whole batch leave together."""
        self._in_flight -= 1
        self._in_flight_bytes -= length
        self._budget.give(length)
        if not self._replies:
            asyncio.get_running_loop().call_soon(self._send_replies)
        self._replies.append(
            final_reply(self.mode, cookie, offset)
            if error is None
            else self._failure("WRITE", cookie, offset, length, error)
        )

    def _send_replies(self) -> None:
        self._send_written()
        self.resume()

    def _send_written(self) -> None:
        replies, self._replies = self._replies, []
        if replies:
            self._output.send(b"".join(replies))

    async def _write_slowly(self, flags: int, cookie: int, offset: int, payload: memoryview) -> None:
        try:
            await self.node.write(offset, payload, fua=bool(flags & CMD_FLAG_FUA))
        except Exception as error:
            self._reply_failure("WRITE", cookie, offset, len(payload), error)
        else:
            self._output.send(final_reply(self.mode, cookie, offset))
        self._payloads.give(payload)

    # --- everything else -------------------------------------------------------------------------------------------

    def _reply_flushed(self, asked: list[Asked], error: Exception | None) -> None:
        self._output.send(
            b"".join(
                final_reply(self.mode, cookie, offset)
                if error is None
                else self._failure("FLUSH", cookie, offset, 0, error)
                for cookie, offset in asked
            )
        )

    async def _trim(self, flags: int, offset: int, length: int) -> None:
        await self.node.discard(offset, length, fua=bool(flags & CMD_FLAG_FUA))

    async def _cache(self, flags: int, offset: int, length: int) -> None:
        if not self._budget.take(MIB):
            await self._budget.wait(MIB)
        try:
            await self.node.cache(offset, min(length, _MAX_CACHED))
        finally:
            self._budget.give(MIB)

    async def _write_zeroes(self, flags: int, offset: int, length: int) -> None:
        await self.node.zero(
            offset,
            length,
            unmap=not flags & CMD_FLAG_NO_HOLE,
            fast=bool(flags & CMD_FLAG_FAST_ZERO),
            fua=bool(flags & CMD_FLAG_FUA),
        )

    async def _answer(
        self, work: Callable[..., Coroutine[Any, Any, None]], flags: int, cookie: int, offset: int, length: int
    ) -> None:
        try:
            await work(flags, offset, length)
        except Exception as error:
            self._reply_failure(work.__name__.lstrip("_").upper(), cookie, offset, length, error)
        else:
            self._output.send(final_reply(self.mode, cookie, offset))

    async def _block_status(self, flags: int, cookie: int, offset: int, length: int, payload: bytes | None) -> None:
        try:
            bitmaps = self.export.bitmaps
            reply = await status_reply(
                self.node, self.mode, self.contexts, bitmaps, self.rules, flags, cookie, offset, length, payload
            )
        except Exception as error:
            self._reply_failure("BLOCK_STATUS", cookie, offset, length, error)
        else:
            self._output.send(reply)

    def _reply_failure(self, name: str, cookie: int, offset: int, length: int, error: Exception) -> None:
        self._output.send(self._failure(name, cookie, offset, length, error))

    def _failure(self, name: str, cookie: int, offset: int, length: int, error: Exception) -> bytes:
        """The reply to a request that failed with ``error``, which is logged."""
        what = f"{name} of {length} bytes at {offset} of export {self.export.name!r}"
        if isinstance(error, OSError | RequestError):
            log.warning("%s failed: %s", what, error)
        else:
            log.error("%s failed in an unforeseen way", what, exc_info=error)
        self.export.on_failure(name, error)
        return final_reply(self.mode, cookie, offset, wire_error(errno_of(error)), f"{name}: {error}")

    # --- tasks -----------------------------------------------------------------------------------------------------

    def _begin(self, work: Coroutine[Any, Any, None], length: int) -> None:
        self._in_flight += 1
        self._in_flight_bytes += length
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, length))

    def _ended(self, task: asyncio.Task[None], length: int) -> None:
        self.tasks.discard(task)
        self._in_flight -= 1
        self._in_flight_bytes -= length
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request of export %r ended in an unforeseen error", self.export.name, exc_info=error)
        self.resume()
