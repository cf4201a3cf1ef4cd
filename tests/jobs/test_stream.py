"""Stream: the top layer becomes independent of the layers below it, or of those above a base."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import JobError, RequestError
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.jobs.status import JobStatus
from nbdserve.jobs.stream import Stream
from tests.jobs.chains import SIZE, UNIT, begin, chain, letters, opened, until
from tests.support import images


@pytest.mark.parametrize("fmt", ["vmdk", "vpc", "vhdx"])
async def test_formats_that_know_the_identity_of_their_backing_file(tmp_path: Path, fmt: str) -> None:
    node = await chain(tmp_path, f"{fmt} 0a 1a 2a 9a", f"{fmt} 1b 2z", f"{fmt} 3c 4c")
    await node.write(5 * UNIT + 512, b"e" * 1024)
    await node.write(5 * UNIT, b"e" * UNIT)
    await Stream("job", node, 2).result()
    assert [Path(layer.path).name for layer in node.layers] == [f"2.{fmt}", f"0.{fmt}"]
    assert await letters(node) == "ab.cce...a"
    await node.write(6 * UNIT, b"f" * UNIT)
    await node.close()
    assert await opened(tmp_path / f"2.{fmt}") == "ab.ccef..a"
    node = await open_image(ImageSpec(str(tmp_path / f"2.{fmt}"), fmt))
    await Stream("job", node).result()
    assert [len(node.layers), node.top.backing] == [1, None]
    await node.write(12 * UNIT + 512, b"g" * 512)
    assert await node.read(12 * UNIT, 2048) == bytes(512) + b"g" * 512 + bytes(1024)
    await node.write(12 * UNIT, b"g" * UNIT)
    await node.zero(0, UNIT)
    for number in range(2):
        (tmp_path / f"{number}.{fmt}").unlink()
    assert await letters(node) == ".b.ccef..a..g"
    result = await node.top.check()
    assert not result.corruptions, result.messages
    await node.close()
    assert await opened(tmp_path / f"2.{fmt}") == ".b.ccef..a..g"
    if images.HAVE_QEMU:
        raw = images.raw_content(tmp_path / f"2.{fmt}", fmt, tmp_path)
        assert [raw[number * UNIT] for number in (0, 1, 9, 12)] == [0, ord("b"), ord("a"), ord("g")]


@pytest.mark.parametrize("top", ["qcow2", "qed"])
async def test_everything(tmp_path: Path, top: str) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a 9a", "qcow2 1b 2z", f"{top} 3c")
    await node.zero(9 * UNIT, UNIT)
    await Stream("job", node).result()
    assert len(node.layers) == 1
    assert node.top.backing is None
    assert await letters(node) == "ab.c"
    await node.close()
    for name in ("0.raw", "1.qcow2"):
        (tmp_path / name).unlink()
    assert await opened(tmp_path / f"2.{top}") == "ab.c"


async def test_down_to_a_base(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a 3a", "qcow2 1b 2z", "qcow2 0c")
    await Stream("job", node, 2).result()
    assert [Path(layer.path).name for layer in node.layers] == ["2.qcow2", "0.raw"]
    assert await letters(node) == "cb.a"
    await node.close()
    assert await opened(tmp_path / "2.qcow2") == "cb.a"


async def test_a_layer_that_ends_early_hides_the_base(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a 3a", "qcow2 0b", "qcow2", sizes=(4 * UNIT, 2 * UNIT, 4 * UNIT))
    assert await letters(node) == "ba"
    await Stream("job", node, 2).result()
    assert await letters(node) == "ba"
    await node.close()


async def test_clients_write_meanwhile_and_cancel_leaves_a_chain(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a 1a 2a 20a", "qcow2", sizes=(2 * SIZE, 2 * SIZE))
    job = begin(Stream("job", node, speed=1))
    while job.busy or not job.current_progress:  # for 18 hours, after the first of two steps
        await asyncio.sleep(0)
    await node.write(0, b"b" * UNIT)
    await node.zero(UNIT, UNIT)
    job.cancel()
    await job.wait()
    assert len(node.layers) == 2
    expected = f"b.a{'a':.>18}"
    assert await letters(node) == expected
    await node.close()
    assert await opened(tmp_path / "1.qcow2") == expected


@pytest.mark.parametrize("policy", ["report", "ignore", "stop"])
async def test_what_cannot_be_read_keeps_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    node = await chain(tmp_path, "raw 0a 1a 7a", "qcow2 2b")
    real = node.read_pieces_locked
    broken = True

    async def fail(offset: int, buffer: memoryview) -> object:
        if broken:
            raise RequestError(5, "bad sector")
        return await real(offset, buffer)

    monkeypatch.setattr(node, "read_pieces_locked", fail)
    job = begin(Stream("job", node, on_error=policy))
    if policy == "stop":
        await until(job, JobStatus.PAUSED)
        broken = False
        job.resume()
        await job.wait()
        assert job.error is None
        assert len(node.layers) == 1
    else:
        await job.wait()
        assert job.error_text == "bad sector"
        assert len(node.layers) == 2
        broken = False
    assert await letters(node) == "aab....a"
    await node.close()


async def test_a_header_that_cannot_be_written_keeps_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await chain(tmp_path, "raw 0a", "qcow2 1b")

    async def fail(driver: Qcow2Driver, *arguments: object) -> None:
        raise OSError(5, "no")

    monkeypatch.setattr(Qcow2Driver, "set_backing", fail)
    with pytest.raises(OSError, match="no"):
        await Stream("job", node).result()
    assert len(node.layers) == 2
    assert await letters(node) == "ab"
    await node.close()


async def test_nothing_to_do(tmp_path: Path) -> None:
    node = await chain(tmp_path, "raw 0a", "qcow2 1b")
    await Stream("job", node, 1).result()
    assert len(node.layers) == 2
    with pytest.raises(JobError, match="no layer"):
        Stream("job", node, 3)
    await node.close()
