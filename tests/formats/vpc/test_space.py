"""The footer is always last, and what is handed out reads as zeroes."""

from __future__ import annotations

import errno
import struct

import pytest

from nbdserve.formats.vpc.space import BlockSpace
from tests.support.recording import Barrier, ByteStorage, Change, Recorder
from tests.support.replay import Replay

FOOTER = b"conectix" + b"F" * 504
END = 2048


def space(storage: ByteStorage, block_size: int = 4096, bitmap_size: int = 512) -> BlockSpace:
    return BlockSpace(storage, FOOTER, END, block_size=block_size, bitmap_size=bitmap_size)


def image(tail: bytes = b"") -> bytes:
    return b"U" * END + tail + FOOTER


@pytest.mark.parametrize(("block_size", "bitmap_size"), [(4096, 512), (1 << 16, 512), (1 << 22, 1024)])
async def test_blocks_stand_close_together(block_size: int, bitmap_size: int) -> None:
    storage = ByteStorage(image())
    blocks = space(storage, block_size, bitmap_size)
    stride = block_size + bitmap_size
    assert await blocks.take(2) == [END, END + stride]
    assert await blocks.take(1) == [END + 2 * stride]
    assert storage.content.startswith(b"U" * END)
    assert storage.content.endswith(FOOTER)
    assert not any(storage.content[END:-512])
    assert (len(storage.content) - END - 512) % stride == 0
    assert len(storage.content) >= END + 3 * stride + 512


async def test_growing_takes_larger_steps() -> None:
    storage = ByteStorage(image())
    blocks = space(storage)
    sizes = []
    for _ in range(40):
        await blocks.take(1)
        sizes.append(len(storage.content))
    assert len(set(sizes)) < 8


@pytest.mark.parametrize("tail", [b"", b"J" * 512, b"J" * 5000, b"J" * 100])
async def test_junk_behind_the_last_block_is_cut_off(tail: bytes) -> None:
    storage = ByteStorage(image(tail))
    blocks = space(storage)
    await blocks.take(1)
    assert b"J" not in storage.content
    assert not any(storage.content[END:-512])
    await blocks.tidy()
    assert bytes(storage.content) == b"U" * END + bytes(4608) + FOOTER


async def test_tidying_writes_a_footer_that_is_missing() -> None:
    for content in (b"U" * END, b"U" * END + b"x" * 300, b"U" * END + b"x" * 512):
        storage = ByteStorage(content)
        await space(storage).tidy()
        assert bytes(storage.content) == image()


async def test_nothing_is_written_where_all_is_well() -> None:
    recorder = Recorder(jitter=0)
    storage = recorder.storage(image())
    await space(storage).tidy()
    assert recorder.log == []


async def test_at_every_moment_a_footer_is_last() -> None:
    recorder = Recorder(jitter=0)
    storage = recorder.storage(image(b"J" * 9000))
    blocks = space(storage)
    for _ in range(5):
        await blocks.take(3)
    content = bytearray(recorder.initial[0])
    pending = 0
    for entry in recorder.log:
        if isinstance(entry, Barrier):
            pending = 0
        elif isinstance(entry, Change):
            pending += 1
            assert pending == 1, "two changes between barriers: a crash could keep the second one alone"
            if entry.kind == "truncate":
                del content[entry.offset :]
            else:
                end = entry.offset + entry.length
                content.extend(bytes(max(0, end - len(content))))
                content[entry.offset : end] = entry.data
            assert content.endswith(FOOTER)


async def test_a_block_device_is_zeroed_first() -> None:
    storage = ByteStorage(b"U" * END + FOOTER + b"J" * 40000)
    storage.grows_zeroed = False
    size = len(storage.content)
    blocks = space(storage)
    (place,) = await blocks.take(1)
    assert not any(storage.content[place : place + 4608])
    assert len(storage.content) == size
    end = storage.content.rindex(FOOTER)
    assert not any(storage.content[place:end])
    with pytest.raises(OSError, match="full") as caught:
        await blocks.take(20)
    assert caught.value.errno == errno.ENOSPC


async def test_entries_have_32_bits() -> None:
    storage = ByteStorage(image())
    blocks = BlockSpace(storage, FOOTER, (1 << 41) - 8192, block_size=4096, bitmap_size=512)
    blocks._room = blocks.end  # as if the file were that long
    with pytest.raises(OSError, match="2 TiB"):
        await blocks.take(3)


async def test_clear() -> None:
    storage = ByteStorage(image())
    blocks = space(storage)
    first, second = await blocks.take(2)
    storage.content[first : second + 600] = b"J" * (second + 600 - first)
    await blocks.clear(first)
    assert storage.content[first : first + 512] == b"J" * 512
    assert not any(storage.content[first + 512 : second])
    assert storage.content[second : second + 600] == b"J" * 600


async def test_open_only_after_the_first_block() -> None:
    blocks = space(ByteStorage(image()))
    assert not blocks.is_open
    await blocks.take(1)
    assert blocks.is_open


async def _recorded(seed: int, ignored_site: str | None = None) -> Recorder:
    """Blocks are taken, and entries that show them are made stable, which is what their taker does first."""
    recorder = Recorder(seed, ignored_site=ignored_site)
    storage = recorder.storage(bytes(END) + FOOTER)
    blocks = space(storage)
    for number in range(END // 512):
        (place,) = await blocks.take(1)
        await storage.write_stable([(number * 512, struct.pack(">I", place).ljust(512, b"\0"))])
    return recorder


def _faults(recorder: Recorder, seed: int) -> set[str]:
    """What is wrong in some state a crash could have left."""
    found = set()
    for state in Replay(recorder, None, seed).states(300):
        content = bytes(state.contents[0])
        if not content.endswith(FOOTER):
            found.add("no footer at the end")
        for at in range(0, END, 512):
            place = int.from_bytes(content[at : at + 4], "big")
            if place and any(content[place : place + 4608]):
                found.add("a block that is shown is not zeroes")
    return found


async def test_crashes_and_the_controls_without_either_barrier() -> None:
    for seed in range(3):
        recorder = await _recorded(seed)
        assert not _faults(recorder, seed)
    sites = {site.split(":")[1]: site for site in recorder.sites}
    for function, fault in (
        ("_barrier_new_footer", "no footer at the end"),
        ("_barrier_old_footer", "a block that is shown is not zeroes"),
    ):
        faults = [_faults(await _recorded(seed, sites[function]), seed) for seed in range(3)]
        assert fault in set().union(*faults), f"nobody misses {function}"
