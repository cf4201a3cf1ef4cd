"""What a crash may leave of the marks of a change: the content ID, and ``uncleanShutdown``.

The crash replay of all formats reads the image alone, and its reader looks at neither: they are for children of the
image, and for those who use the redundant grain tables.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Iterator

import pytest

from nbdserve.block.node import Node
from nbdserve.formats.vmdk import layout
from nbdserve.formats.vmdk.driver import VmdkDriver
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import Replay
from tests.support.workload import read_all

GRAIN = 64 * KIB
SIZE = 12 * GRAIN
SEEDS = range(3)


async def _image() -> bytes:
    """Closed, half of its grains written."""
    storage = MemoryStorage()
    await VmdkDriver.create(storage, SIZE, {})
    node = Node([await VmdkDriver.open(storage, {}, read_only=False)])
    for number in range(0, 12, 2):
        await node.write(number * GRAIN, bytes([number + 1]) * GRAIN)
    await node.flush()
    content = bytes(await storage.read(0, storage.size))
    await node.close()
    mark = layout.UNCLEAN_AT
    return content[:mark] + b"\0" + content[mark + 1 :]


async def _used(seed: int, ignored_site: str | None = None) -> Recorder:
    """The image on a recorded storage, opened, written here and there, and mostly closed."""
    recorder = Recorder(seed, ignored_site=ignored_site)
    rng = random.Random(seed)
    node = Node([await VmdkDriver.open(recorder.storage(await _image()), {}, read_only=False)])
    for _ in range(8):
        await node.write(rng.randrange(SIZE // 512) * 512, b"D" * 512)
        if rng.random() < 0.4:
            await node.flush()
    if rng.random() < 0.7:
        await node.close()
    return recorder


def _states(recorder: Recorder, seed: int) -> Iterator[bytes]:
    seen: set[bytes] = set()
    for state in Replay(recorder, None, seed).states(200):
        content = bytes(state.contents[0])
        if content not in seen:
            seen.add(content)
            yield content


def _cid(content: bytes) -> str:
    found = re.search(rb"^CID=(\w+)", content[512 : 512 + layout.DESCRIPTOR_BYTES], re.MULTILINE)
    assert found is not None
    return found[1].decode()


async def _guest(content: bytes) -> bytes:
    node = Node([await VmdkDriver.open(ByteStorage(content), {}, read_only=True)])
    return await read_all(node, SIZE)


async def _changed_with_the_old_id(recorder: Recorder, seed: int) -> bool:
    """Whether a crash could leave other content under the content ID that it had."""
    cid, guest = _cid(recorder.initial[0]), await _guest(recorder.initial[0])
    for content in _states(recorder, seed):
        if _cid(content) == cid and await _guest(content) != guest:
            return True
    return False


def _table_entries(content: bytes, directory: int) -> bytes:
    (table,) = struct.unpack_from("<I", content, directory)
    return content[table * 512 : table * 512 + 4 * (SIZE // GRAIN)]


def _unlike_without_mark(recorder: Recorder, seed: int) -> bool:
    """Whether a crash could leave a table that is not like its copy, in an image that says it was closed."""
    header = layout.parse_hosted(recorder.initial[0][:512], "image", len(recorder.initial[0]))
    return any(
        not content[layout.UNCLEAN_AT]
        and _table_entries(content, header.directory_offset) != _table_entries(content, header.redundant_offset)
        for content in _states(recorder, seed)
    )


async def test_what_changed_has_another_content_id() -> None:
    assert not [seed for seed in SEEDS if await _changed_with_the_old_id(await _used(seed), seed)]
    (site,) = (site for site in (await _used(0)).sites if ":_barrier_new_cid:" in site)
    assert [seed for seed in SEEDS if await _changed_with_the_old_id(await _used(seed, site), seed)]


async def test_tables_that_differ_from_their_copies_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control leaves the mark out: a flush of its own it does not need (see ``_mark_unclean``)."""
    assert not [seed for seed in SEEDS if _unlike_without_mark(await _used(seed), seed)]

    async def unmarked(self: VmdkDriver) -> None:
        for extent in self._pending:
            extent.needs_mark = False
        self._pending = []

    monkeypatch.setattr(VmdkDriver, "_mark_unclean", unmarked)
    assert [seed for seed in SEEDS if _unlike_without_mark(await _used(seed), seed)]
