from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nbdserve.block.bulk import Ranges
from nbdserve.block.create import create_files
from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.block.transfer import transfer
from nbdserve.errors import RequestError
from nbdserve.formats.registry import driver_for
from nbdserve.jobs import copy as copying
from nbdserve.jobs.copy import CHUNK, Copy, CopyOptions, unit_for
from nbdserve.jobs.stretches import Stretch, What
from nbdserve.units import KIB
from tests.support.images import needs_qemu, run

SIZE = 3 * CHUNK + 12345


class Disk:
    """Source and target in memory, which lets others go first, and counts."""

    path = "disk"

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.calls: list[tuple[str, int, int]] = []
        self.in_flight = self.most = 0
        self.broken: set[int] = set()

    async def _turn(self, what: str, offset: int, length: int) -> None:
        self.calls.append((what, offset, length))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            for _ in range(1 + random.Random(offset).randrange(4)):
                await asyncio.sleep(0)
        finally:
            self.in_flight -= 1
        if any(offset <= bad < offset + length for bad in self.broken):
            raise OSError(5, f"{what} went wrong")

    async def read_all(self, ranges: Ranges) -> None:
        for offset, buffer in ranges:
            await self._turn("read", offset, len(buffer))
            buffer[:] = self.content[offset : offset + len(buffer)]

    async def write_all(self, ranges: Ranges) -> None:
        for offset, data in ranges:
            await self.write(offset, data)

    async def write(self, offset: int, data: memoryview) -> None:
        await self._turn("write", offset, len(data))
        self.content[offset : offset + len(data)] = data

    async def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        await self._turn("zero", offset, length)
        self.content[offset : offset + length] = bytes(length)


async def given(*what: tuple[int, int, What]) -> AsyncIterator[Stretch]:
    for stretch in what:
        yield Stretch(*stretch)


def noise(size: int = SIZE) -> bytes:
    return random.Random(1).randbytes(size)


async def test_data_zeroes_and_what_stays() -> None:
    source, target = Disk(noise()), Disk(b"t" * SIZE)
    what = given(
        (0, 5000, What.DATA), (5000, 8192, What.ZERO), (13192, 4096, What.SKIP), (17288, SIZE - 17288, What.DATA)
    )
    done: list[int] = []
    await Copy(source, target, CopyOptions(progress=done.append)).run(what)
    expected = source.content[:5000] + bytes(8192) + b"t" * 4096 + source.content[17288:]
    assert target.content == expected
    assert sum(done) == SIZE
    assert all(length <= CHUNK for _, _, length in source.calls)


async def test_zeroes_in_the_data_become_zeroes() -> None:
    content = noise(40960)[:4096] + bytes(8192) + noise(40960)[12288:]
    for zeroed in (False, True):
        source, target = Disk(content), Disk(bytes(40960) if zeroed else b"t" * 40960)
        await Copy(source, target, CopyOptions(zeroed=zeroed)).run(given((0, 40960, What.DATA)))
        assert target.content == content
        assert sorted(call[:2] for call in target.calls) == sorted(
            [("write", 0), ("write", 12288)] + ([] if zeroed else [("zero", 4096)])
        )


@pytest.mark.parametrize("options", [{"sparse": 0}, {"write_zeroes": True}])
async def test_everything_is_written_where_that_is_asked_for(options: dict[str, Any]) -> None:
    source, target = Disk(bytes(20000)), Disk(b"t" * 20000)
    what = given((0, 10000, What.DATA), (10000, 10000, What.ZERO))
    await Copy(source, target, CopyOptions(zeroed=True, **options)).run(what)
    assert [call[0] for call in target.calls] == ["write", "write"]
    assert target.content == bytes(20000)


async def test_a_shift() -> None:
    source, target = Disk(noise(8192)), Disk(bytes(20000))
    await Copy(source, target, CopyOptions(), shift=1000).run(given((0, 8192, What.DATA)))
    assert target.content == bytes(1000) + source.content + bytes(20000 - 9192)


@pytest.mark.parametrize("requests", [1, 3])
async def test_requests_in_flight(requests: int) -> None:
    source, target = Disk(noise()), Disk(bytes(SIZE))
    await Copy(source, target, CopyOptions(requests=requests)).run(given((0, SIZE, What.DATA)))
    assert (source.most > 1) == (requests > 1)
    assert source.most <= requests
    assert target.content == source.content


async def test_in_order() -> None:
    source, target = Disk(noise()), Disk(bytes(SIZE))
    await Copy(source, target, CopyOptions(in_order=True)).run(given((0, SIZE, What.DATA)))
    writes = [offset for what, offset, _ in target.calls if what == "write"]
    assert writes == sorted(writes)


async def test_compressed() -> None:
    source, target = Disk(bytes(65536) + noise(SIZE)[65536:]), Disk(bytes(SIZE))
    options = CopyOptions(unit=65536, compress=target.write, zeroed=True)
    await Copy(source, target, options).run(given((0, SIZE, What.DATA)))
    assert target.content == source.content
    assert min(offset for what, offset, _ in target.calls) == 65536


@pytest.mark.parametrize("side", ["source", "target"])
async def test_the_first_error_ends_it(side: str) -> None:
    source, target = Disk(noise()), Disk(bytes(SIZE))
    source.path, target.path = "source", "target"
    (source if side == "source" else target).broken.add(5)
    with pytest.raises(OSError, match=f"{'read' if side == 'source' else 'write'} went wrong: '{side}'"):
        await Copy(source, target, CopyOptions(requests=2)).run(given((0, SIZE, What.DATA)))
    assert source.in_flight == target.in_flight == 0
    assert len(target.calls) < 4


async def test_errors_are_skipped() -> None:
    source, target = Disk(noise()), Disk(b"t" * SIZE)
    source.broken.add(70000)
    told: list[tuple[int, int, Exception]] = []
    options = CopyOptions(skip_errors=lambda *what: told.append(what))
    await Copy(source, target, options).run(given((0, SIZE, What.DATA)))
    [(offset, length, error)] = told
    assert offset <= 70000 < offset + length <= offset + 512
    assert isinstance(error, OSError)
    expected = bytearray(source.content)
    expected[offset : offset + length] = bytes(length)
    assert target.content == expected


async def test_a_failure_of_the_map() -> None:
    async def broken() -> AsyncIterator[Stretch]:
        yield Stretch(0, CHUNK, What.DATA)
        raise RequestError(5, "a corrupt table")

    source, target = Disk(noise()), Disk(bytes(SIZE))
    with pytest.raises(RequestError, match="a corrupt table"):
        await Copy(source, target, CopyOptions()).run(broken())
    assert source.in_flight == target.in_flight == 0


class Pace:
    """Pauses once, and wants nothing to be in flight then."""

    def __init__(self, source: Disk) -> None:
        self.source = source
        self.asked: list[int] = []

    @property
    def pause_requested(self) -> bool:
        return len(self.asked) == 2

    async def throttle(self, length: int) -> None:
        if self.pause_requested:
            assert self.source.in_flight == 0
        self.asked.append(length)


async def test_the_pace() -> None:
    source, target = Disk(noise()), Disk(bytes(SIZE))
    pace = Pace(source)
    await Copy(source, target, CopyOptions(), pace=pace).run(given((0, SIZE, What.DATA)))
    assert pace.asked == [CHUNK, CHUNK, CHUNK, 12345]


@pytest.mark.parametrize(
    ("granularity", "sparse", "unit"),
    [
        (1, 4096, 4096),
        (65536, 4096, 65536),
        (1 << 21, 4096, 65536),
        (512, 512, 512),
        (512, 12 << 10, 4096),
        (1, 0, 512),
    ],
)
def test_the_unit(granularity: int, sparse: int, unit: int) -> None:
    assert unit_for(granularity, sparse) == unit


@needs_qemu
@pytest.mark.parametrize("form", ["qcow2", "raw"])
async def test_data_goes_in_one_trip_until_there_are_zeroes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    step = 64 * KIB
    monkeypatch.setattr(copying, "CHUNK", 2 * step)
    monkeypatch.setattr(copying, "_TRIP", 8 * step)
    outcomes: list[bool] = []

    async def counted(*arguments: Any) -> bool:
        outcomes.append(await transfer(*arguments))
        return outcomes[-1]

    monkeypatch.setattr(copying, "transfer", counted)
    # Requests of two steps are seen to be data; then larger ones are tried, until one holds zeroes.
    full, mixed = 48, [1, 1, 0, 1] * 8
    content = b"".join(
        random.Random(n).randbytes(step) if data else bytes(step) for n, data in enumerate([1] * full + mixed)
    )
    (tmp_path / "source").write_bytes(content)
    path = tmp_path / "target"
    await create_files(driver_for(form), [str(path)], len(content), {})
    source = await open_image(ImageSpec(str(tmp_path / "source"), "raw", read_only=True))
    target = await open_image(ImageSpec(str(path), form, discard="unmap"))
    done: list[int] = []
    options = CopyOptions(requests=1, unit=step, zeroed=True, in_order=True, progress=done.append)
    await Copy(source, target, options).run(given((0, len(content), What.DATA)))
    *before, last = outcomes
    assert len(before) >= 4
    assert all(before)
    assert not last
    assert sum(done) == len(content)
    await source.close()
    await target.close()
    run("qemu-img", "compare", "-f", "raw", "-F", form, str(tmp_path / "source"), str(path))
    if form == "qcow2":
        run("qemu-img", "check", "-q", "-f", form, str(path))
