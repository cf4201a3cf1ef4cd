from __future__ import annotations

import random
from typing import Any

import pytest

from nbdserve.errors import RequestError
from tests.formats.qcow.test_driver import CLUSTER, SIZE, made, opened
from tests.support.recording import ByteStorage


async def test_written_over_and_over() -> None:
    choose = random.Random(2)
    storage = await made(SIZE - 512)
    content = bytearray(SIZE - 512)
    node = await opened(storage)
    for _ in range(25):
        start = choose.randrange(0, SIZE - 512, CLUSTER)
        end = min(start + choose.randrange(1, 300) * CLUSTER, len(content))
        data = bytearray(choose.choice((b"abc", b"\0", b"word ")) * SIZE)[: end - start]
        for _ in range(choose.randrange(4)):  # clusters that do not get smaller
            at = choose.randrange(0, len(data), CLUSTER)
            data[at : at + CLUSTER] = choose.randbytes(min(CLUSTER, len(data) - at))
        if choose.random() < 0.8:
            await node.write_compressed(start, data)
        else:
            await node.write(start, data)
        content[start:end] = data
        assert await node.read(0, len(content)) == content
    await node.close()
    node = await opened(storage)
    assert await node.read(0, len(content)) == content
    result = await node.top.check()
    assert (result.corruptions, result.check_errors) == (0, 0)
    assert result.compressed_clusters > 20
    await node.close()


async def test_a_write_that_fails_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = await made()
    node = await opened(storage)
    await node.write_compressed(0, b"old" * CLUSTER)

    async def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ByteStorage, "write", full)
        with pytest.raises(OSError, match="No space left"):
            await node.write_compressed(0, b"new" * CLUSTER)
    assert await node.read(0, 3 * CLUSTER) == b"old" * CLUSTER
    await node.write_compressed(0, b"new" * CLUSTER)
    assert await node.read(0, 3 * CLUSTER) == b"new" * CLUSTER
    await node.close()


async def test_only_whole_clusters() -> None:
    node = await opened(await made())
    for offset, length in ((512, CLUSTER), (0, CLUSTER + 512)):
        with pytest.raises(RequestError, match="written whole"):
            await node.write_compressed(offset, bytes(length))
    await node.close()
