"""Encrypted exports: what a batch has gathered is finished before its replies leave."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from nbdserve.block.node import Node
from nbdserve.extents import DATA, UNALLOCATED, Run
from nbdserve.formats.encryption.ciphers import IvGenerator
from nbdserve.formats.encryption.storage import EncryptedStorage
from nbdserve.formats.encryption.xts import XtsCipher
from nbdserve.formats.raw import RawDriver
from nbdserve.protocol.codec import EXTENDED, SIMPLE, STRUCTURED
from nbdserve.protocol.constants import CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_WRITE
from nbdserve.storage.base import Storage
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB, MIB
from tests.server.clients import raw, serving

CIPHER = XtsCipher(bytes(range(64)), IvGenerator("plain64"))
MODES = pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED, EXTENDED], ids=["simple", "structured", "extended"])


class HalfThere(RawDriver):
    """The first half of the disk is in the storage, the rest below."""

    def linear_offset(self) -> None:
        """It is mapped."""

    def lookup(self, offset: int, length: int) -> Run:
        half = self.size // 2
        return (DATA, min(length, half - offset), offset) if offset < half else (UNALLOCATED, length, -1)


def encrypted(content: bytes) -> Storage:
    return EncryptedStorage(MemoryStorage(bytes(CIPHER.encrypt(0, content))), CIPHER)


@MODES
async def test_batches_of_every_kind_of_request(tmp_path: Path, mode: int) -> None:
    rng, size = random.Random(mode), MIB
    model = bytearray(os.urandom(size))
    async with serving(tmp_path, raw(encrypted(bytes(model)))) as served:
        client = await served.connect(mode=mode)
        for _ in range(25):
            expected: dict[int, bytes] = {}
            written: list[tuple[int, bytes]] = []
            parts = list(range(0, size, 32 * KIB))
            rng.shuffle(parts)
            packet = b""
            for part in parts:  # no two requests of a batch overlap: their order is not defined
                length = rng.choice((512, 4096, 8192, 16 * KIB, 20 * KIB, 32 * KIB, 1000))
                kind = rng.choice((CMD_READ, CMD_READ, CMD_WRITE, CMD_FLUSH))
                if kind == CMD_FLUSH:
                    packet += client.transmission.request(CMD_FLUSH)[1]
                elif kind == CMD_READ:
                    cookie, head = client.transmission.request(CMD_READ, part, length)
                    packet += head
                    expected[cookie] = bytes(model[part : part + length])
                else:
                    data = os.urandom(length)
                    flags = rng.choice((0, 0, 0, CMD_FLAG_FUA))
                    packet += client.transmission.request(CMD_WRITE, part, length, flags=flags)[1] + data
                    written.append((part, data))
            await client.send(packet)
            for cookie in [reply.cookie for reply in client.transmission.in_flight]:
                reply = await client.reply(cookie)
                assert not reply.error
                if cookie in expected:
                    assert reply.data == expected[cookie]
            for part, data in written:
                model[part : part + len(data)] = data
        reply = await client.ask(CMD_READ, 0, size)
        assert reply.data == model
        client.close()


@MODES
async def test_a_reply_sent_from_a_file_below_follows_decrypted_ones(tmp_path: Path, mode: int) -> None:
    content = os.urandom(MIB)
    half = MIB // 2
    (tmp_path / "base").write_bytes(content)
    base = await FileStorage.open(str(tmp_path / "base"), read_only=True)
    assert base.can_send(half, 64 * KIB), "the file system of the tests can send from its cache"
    top = HalfThere(encrypted(content[:half]), 0, MIB, read_only=True)
    node = Node([top, RawDriver(base, 0, MIB, read_only=True)])
    async with serving(tmp_path, node) as served:
        client = await served.connect(mode=mode)
        ranges = [(0, 4096), (8192, 512), (half, 64 * KIB), (4096, 4096), (half + 64 * KIB, 128 * KIB), (512, 512)]
        packet, cookies = b"", []
        for offset, length in ranges:
            cookie, head = client.transmission.request(CMD_READ, offset, length)
            packet += head
            cookies.append(cookie)
        await client.send(packet)
        for cookie, (offset, length) in zip(cookies, ranges, strict=True):
            assert (await client.reply(cookie)).data == content[offset : offset + length]
        client.close()
