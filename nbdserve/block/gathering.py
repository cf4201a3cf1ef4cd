"""Encrypted data, a batch of requests at a time: the ciphers take little longer for many sectors than for one.

What a batch reads is decrypted when its replies are about to leave; what it overwrites is encrypted then, too, written,
and acknowledged. 4 KiB of XTS take 30 us by themselves and 8 us as one of sixteen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_DONE, WRITE_TAKEN, Done
from nbdserve.extents import DATA
from nbdserve.formats.encryption.ciphers import Piece
from nbdserve.formats.encryption.storage import EncryptedStorage, GatheredWrite


class GatheringNode:
    """The requests of a node that need no waiting, as one session makes them.

    ``finish`` is called before the event loop goes on: until then a buffer that was read into is not decrypted, and
    the data of a write have to stay where they are.
    """

    def __init__(self, node: Node, storages: Sequence[EncryptedStorage]) -> None:
        self._node = node
        self._reads: list[tuple[EncryptedStorage, list[Piece]]] = [(storage, []) for storage in storages]
        """What was read of each storage."""
        self._writes: list[GatheredWrite] = []
        self._answers: list[tuple[int, memoryview, Done]] = []
        """Guest offset, data and who is told, for each of ``_writes``."""
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def of(cls, node: Node) -> GatheringNode | None:
        """None for a node without encrypted layers. From a layer that comes later nothing is gathered."""
        storages = [layer.data for layer in node.layers if isinstance(layer.data, EncryptedStorage)]
        return cls(node, storages) if storages else None

    def try_read_into(self, offset: int, buffer: memoryview) -> int:
        """As the node's."""
        for storage, pieces in self._reads:
            storage.reads = pieces
        try:
            return self._node.try_read_into(offset, buffer)
        finally:
            for storage, _ in self._reads:
                storage.reads = None

    def try_write(self, offset: int, data: memoryview) -> bool:
        """As the node's; what may be gathered is left to ``submit_write``."""
        return False

    def submit_write(self, offset: int, data: memoryview, done: Done) -> int:
        """As the node's. Only overwrites are gathered: space that is allocated must not show before it is written."""
        node, top = self._node, self._node.top
        storage = top.data
        if not isinstance(storage, EncryptedStorage):
            return node.submit_write(offset, data, done)
        before = len(self._writes)
        storage.writes = self._writes
        try:
            if node.try_write(offset, data):
                outcome = WRITE_DONE
            else:
                run = top.lookup_writable(offset, len(data))
                if run is None or run[0] != DATA or run[1] < len(data):
                    storage.writes = None
                outcome = node.submit_write(offset, data, done)
        finally:
            storage.writes = None
        if outcome != WRITE_DONE or len(self._writes) == before:
            del self._writes[before:]
            return outcome
        self._answers.append((offset, data, done))
        return WRITE_TAKEN

    def finish(self) -> None:
        """Decrypt what was read, and write what was written, since the last time."""
        for storage, pieces in self._reads:
            if pieces:
                try:
                    storage.cipher.decrypt_each(pieces)
                finally:
                    pieces.clear()
        if self._writes:
            self._write()

    def _write(self) -> None:
        writes, answers = self._writes, self._answers
        self._writes, self._answers = [], []
        storage = writes[0][0]
        encrypted = storage.cipher.encrypt_each([piece for _, _, piece in writes])
        for (_, place, _), data, (offset, plain, done) in zip(writes, encrypted, answers, strict=True):
            if storage.inner.try_write(place, data):
                done(None)
            else:
                task = asyncio.get_running_loop().create_task(self._write_slowly(offset, bytes(plain), done))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _write_slowly(self, offset: int, data: bytes, done: Done) -> None:
        try:
            await self._node.write(offset, data)
        except Exception as error:
            done(error)
        else:
            done(None)
