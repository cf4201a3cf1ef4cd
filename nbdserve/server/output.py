"""The sending side of a connection: one immediate non-blocking send, and a queue for what the socket did not take.

The queue is our own, on a duplicate of the socket, and everything goes through it: a transport's buffer beside it would
reorder bytes.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios
from collections import deque
from collections.abc import Callable
from typing import Final

from nbdserve.buffers import ReusedBuffer
from nbdserve.server.budget import Budget
from nbdserve.storage.base import Storage
from nbdserve.units import KIB, MIB

_COPIED_TAIL: Final = 64 * KIB
"""An unsent tail up to this is copied; for a longer one the whole scratch buffer changes hands."""
SEND_BUFFER: Final = 1 * MIB
"""Asked of the kernel for each unix socket: the 208 KiB it gives by default cut a reply of 256 KiB in two."""


class _Chunk:
    """Bytes that wait for the socket."""

    __slots__ = ("_budget", "_counted", "_data", "_release", "length")

    def __init__(self, data: memoryview, budget: Budget, release: Callable[[], None] | None = None) -> None:
        self._data = data
        self._release = release
        self._budget = budget
        self.length = self._counted = len(data)
        budget.used += self._counted

    def send(self, sock: socket.socket) -> None:
        """Send what the socket takes, and keep the rest. BlockingIOError when it takes nothing."""
        self._data = self._data[sock.send(self._data) :]
        self.length = len(self._data)

    def release(self) -> None:
        """The memory is not needed any more."""
        self._budget.give(self._counted)
        if self._release is not None:
            self._release()


class _FilePart:
    """A range of a storage that waits for the socket."""

    __slots__ = ("length", "offset", "storage")

    def __init__(self, storage: Storage, offset: int, length: int) -> None:
        self.storage = storage
        self.offset = offset
        self.length = length

    def send(self, sock: socket.socket) -> None:
        """As a chunk; the range must be in the page cache."""
        sent = self.storage.send(sock.fileno(), self.offset, self.length)
        self.offset += sent
        self.length -= sent
        if not sent:
            raise BlockingIOError

    def release(self) -> None:
        """It is sent, or nobody waits for it any more."""
        self.storage.let_go()


class Output:
    """Sends bytes in order. ``on_drained``: the queue has become empty; ``on_error``: sending failed."""

    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        on_drained: Callable[[], None],
        on_error: Callable[[OSError], None],
        budget: Budget,
    ) -> None:
        """What waits for the socket counts in ``budget``, but for what is in the page cache."""
        self._sock = sock
        self._budget = budget
        self._loop = loop
        self._on_drained = on_drained
        self._on_error = on_error
        self._queue: deque[_Chunk | _FilePart] = deque()
        self._loading: asyncio.Task[None] | None = None
        self.backlog = 0
        """Bytes that wait for the socket."""
        self._sent_late = 0
        """Bytes that have waited and are sent."""
        self.closed = False

    def send(self, data: bytes | memoryview) -> None:
        """Send ``data``; the memory is free for reuse on return."""
        rest = self._send_now(data)
        if rest:
            self._enqueue(_Chunk(memoryview(bytes(data[len(data) - rest :])), self._budget))

    def send_scratch(self, scratch: ReusedBuffer, length: int) -> None:
        """Send the first ``length`` bytes of ``scratch``, which is free for reuse on return."""
        rest = self._send_now(scratch.view[:length])
        if rest > _COPIED_TAIL:
            kept = scratch.detach()
            self._enqueue(_Chunk(memoryview(kept)[length - rest : length], self._budget, lambda: scratch.recycle(kept)))
        elif rest:
            self._enqueue(_Chunk(memoryview(bytes(scratch.view[length - rest : length])), self._budget))

    def send_owned(self, data: memoryview, release: Callable[[], None]) -> None:
        """Send ``data`` without copying; ``release`` is called when its memory is free."""
        rest = self._send_now(data)
        if rest:
            self._enqueue(_Chunk(data[len(data) - rest :], self._budget, release))
        else:
            release()

    def receive_into(self, buffer: memoryview) -> int:
        """What has arrived on the same socket: its length, 0 at the end of the stream, -1 if there is nothing now."""
        try:
            return self._sock.recv_into(buffer)
        except OSError:
            return -1

    def send_file(self, head: memoryview, storage: Storage, offset: int, length: int) -> None:
        """Send ``head``, which is free for reuse on return, and then a range of ``storage`` that ``can_send``.

        A reply once begun cannot be taken back: when the range turns out to be unreadable, the connection fails.
        """
        rest = self._send_now(head, socket.MSG_MORE)
        if rest:
            self._enqueue(_Chunk(memoryview(bytes(head[len(head) - rest :])), self._budget))
        part = _FilePart(storage, offset, length)
        if not rest and not self.closed:
            try:
                part.send(self._sock)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self._fail(error)
        if part.length and not self.closed:
            storage.hold()
            self._enqueue(part)

    def delivered(self) -> int:
        """A number that grows with what the peer takes of what has waited."""
        if self.closed:
            return self._sent_late
        outstanding = fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4))
        return self._sent_late - int.from_bytes(outstanding, sys.byteorder)

    def _send_now(self, data: bytes | memoryview, flags: int = 0) -> int:
        """How many bytes at the end of ``data`` were not sent (0 on a closed output: nobody waits for them)."""
        if self.closed:
            return 0
        if self._queue:
            return len(data)
        try:
            return len(data) - self._sock.send(data, flags)
        except (BlockingIOError, InterruptedError):
            return len(data)
        except OSError as error:
            self._fail(error)
            return 0

    def _enqueue(self, item: _Chunk | _FilePart) -> None:
        if not self._queue:
            self._loop.add_writer(self._sock.fileno(), self._drain)
        self._queue.append(item)
        self.backlog += item.length

    def _drain(self) -> None:
        queue = self._queue
        while queue:
            item = queue[0]
            if isinstance(item, _FilePart) and not item.storage.can_send(item.offset, item.length):
                self._loop.remove_writer(self._sock.fileno())
                self._loading = self._loop.create_task(self._load(item))
                return
            before = item.length
            try:
                item.send(self._sock)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._fail(error)
                return
            finally:
                self.backlog -= before - item.length
                self._sent_late += before - item.length
            if item.length:
                return
            queue.popleft()
            item.release()
        self._loop.remove_writer(self._sock.fileno())
        self._on_drained()

    async def _load(self, part: _FilePart) -> None:
        """The pages of ``part`` have left the cache since it was begun: read them, and go on."""
        try:
            data = await part.storage.read(part.offset, part.length)
        except OSError as error:
            self._fail(error)
            return
        if not self.closed:
            part.release()
            self._queue[0] = _Chunk(memoryview(data), self._budget)
            self._loop.add_writer(self._sock.fileno(), self._drain)

    def _fail(self, error: OSError) -> None:
        self.close()
        self._on_error(error)

    def close(self) -> None:
        """Drop what is queued and release the socket. Idempotent."""
        if self.closed:
            return
        self.closed = True
        if self._queue:
            self._loop.remove_writer(self._sock.fileno())
        for item in self._queue:
            item.release()
        self._queue.clear()
        self.backlog = 0
        self._sock.close()
