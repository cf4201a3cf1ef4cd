"""Messages to standard error that nobody waits for: a pipe that is not read holds up a thread of its own only."""

from __future__ import annotations

import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

MOST_WAITING: Final = 1000
"""Messages that wait to be written; further ones are counted and dropped."""
LAST_SECONDS: Final = 1.0
"""How long the end waits for those that are still to be written."""


@contextmanager
def written_apart(fd: int | None = None, most: int = MOST_WAITING) -> Iterator[None]:
    """Meanwhile messages are written to ``fd`` (standard error) by a thread, unless somebody has set up logging."""
    root = logging.getLogger()
    if fd is None and sys.stderr is not None:  # closed at the start, its number may be that of an image by now
        fd = sys.stderr.fileno()
    if fd is None or root.hasHandlers():
        yield
        return
    handler = _WrittenApart(fd, most)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.finish(LAST_SECONDS)


class _WrittenApart(logging.Handler):
    """Hands messages to a thread, which is a daemon: what blocks it does not keep the process."""

    def __init__(self, fd: int, most: int) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        self._fd = fd
        self._waiting: queue.Queue[str | None] = queue.Queue(most)
        self._lost = 0
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """With the handler's lock held, as ``_take_lost``."""
        try:
            self._waiting.put_nowait(self.format(record))
        except queue.Full:
            self._lost += 1

    def finish(self, seconds: float) -> None:
        """Wait until all is written, for ``seconds`` at most."""
        end = time.monotonic() + seconds
        try:
            self._waiting.put(None, timeout=seconds)
        except queue.Full:
            return
        self._thread.join(max(0.0, end - time.monotonic()))

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None:
            self._write(line)
            lost = self._take_lost()
            if lost:
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                self._write(f"{now} {__name__}: {lost} messages lost: they were read too slowly")

    def _take_lost(self) -> int:
        assert self.lock is not None
        with self.lock:
            lost, self._lost = self._lost, 0
        return lost

    def _write(self, line: str) -> None:
        """Not through ``sys.stderr``: the interpreter cannot end while a thread waits inside that."""
        rest = memoryview(f"{line}\n".encode(errors="backslashreplace"))
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                select.select([], [self._fd], [])
            except OSError:
                return  # nobody will ever read it
