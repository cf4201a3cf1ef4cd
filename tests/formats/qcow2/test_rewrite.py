"""Tables replaced in one step: refcounts of another width, leaks that stay, images that are not in order."""

from __future__ import annotations

import errno
import random
from dataclasses import replace
from pathlib import Path

import pytest

from nbdserve.errors import ConfigError, CorruptImageError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.rewrite import read_state, replace_tables
from nbdserve.storage.file import FileStorage
from nbdserve.units import MIB
from tests.formats.qcow2.engine import check, content, create, qemu_io, run
from tests.support.images import needs_qemu

pytestmark = needs_qemu


async def _with_width(path: Path, bits: int) -> None:
    storage = await FileStorage.open(str(path))
    try:
        old = await read_state(storage)
        header = replace(old.header, refcount_order=bits.bit_length() - 1)
        await replace_tables(storage, old, replace(old, header=header))
    finally:
        await storage.close()


@pytest.mark.parametrize("cluster_size", ["512", "64k"])
async def test_refcounts_of_every_width(tmp_path: Path, cluster_size: str) -> None:
    path = create(tmp_path / "a.qcow2", 4 * MIB, f"cluster_size={cluster_size}")
    rng = random.Random(1)
    qemu_io(path, *(f"write -P {rng.randrange(1, 256)} {rng.randrange(7000) * 512} 64k" for _ in range(20)))
    expected = content(path)
    sizes = []
    for bits in (64, 1, 32, 2, 8, 4, 16, 16):
        await _with_width(path, bits)
        assert check(path).get("leaks", 0) == 0
        assert f'"refcount-bits": {bits}' in run("qemu-img", "info", "--output=json", path)
        sizes.append(path.stat().st_size)
    assert content(path) == expected
    assert max(sizes) < sizes[0] * 1.3, "free clusters are used again"


async def test_what_is_in_force_does_not_fail_because_free_space_is_not_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -P 1 0 1M")

    async def discard(self: FileStorage, offset: int, length: int) -> None:
        tried.append(offset)
        raise OSError(errno.EIO, "no discard")

    tried: list[int] = []
    monkeypatch.setattr(FileStorage, "discard", discard)
    await _with_width(path, 64)
    assert tried
    assert check(path).get("leaks", 0) == 0


async def test_counts_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -P 1 0 1M")
    for name in ("one", "two", "three"):
        run("qemu-img", "snapshot", "-c", name, path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="refcount of 4, 2 bits count up to 3"):
        await _with_width(path, 2)
    assert path.read_bytes() == before
    await _with_width(path, 4)
    check(path)


async def test_what_was_leaked_stays_leaked(tmp_path: Path) -> None:
    """A cluster that is counted may be in use by a write that has not ended."""
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -P 1 0 128k")
    data = bytearray(path.read_bytes())
    data[0x20000 + 2 * 20 + 1] = 1
    path.write_bytes(data.ljust(21 * 65536, b"\0"))
    await _with_width(path, 32)
    assert check(path, leaks=True)["leaks"] == 1


async def test_an_image_marked_corrupt_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    data = bytearray(path.read_bytes())
    data[layout.INCOMPATIBLE_AT + 7] |= layout.INCOMPATIBLE_CORRUPT
    path.write_bytes(data)
    with pytest.raises(CorruptImageError, match="check -r all"):
        await _with_width(path, 32)
    storage = await FileStorage.open(str(path), read_only=True)
    with pytest.raises(ConfigError, match="read-only"):
        await read_state(storage)
    await storage.close()
