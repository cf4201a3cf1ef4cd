"""What the tests of the qcow2 driver share: stock tools, and the smallest engine that follows the contract."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from nbdserve.extents import COMPRESSED, DATA, UNALLOCATED
from nbdserve.formats.qcow2.driver import Qcow2Driver
from nbdserve.storage.file import FileStorage
from nbdserve.units import align_down, align_up
from tests.cli.processes import greets, until


def run(*command: str | Path, codes: tuple[int, ...] = (0,)) -> str:
    """Run a stock tool; its output."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode in codes, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def create(path: Path, size: int | str, options: str = "", *more: str | Path) -> Path:
    """An image made by qemu-img."""
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), *more, path, str(size))
    return path


def qemu_io(path: Path, *commands: str) -> None:
    """Run qemu-io commands on an image."""
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "qcow2", "-t", "unsafe", *words, path)


def check(path: Path, *, leaks: bool = False) -> dict[str, Any]:
    """qemu-img finds nothing wrong with the image (``leaks``: but leaks)."""
    codes = (0, 3) if leaks else (0,)
    found: dict[str, Any] = json.loads(run("qemu-img", "check", "--output=json", path, codes=codes))
    assert found.get("corruptions", 0) == 0, found
    return found


def mark_in_use(path: Path, name: str) -> None:
    """Its stored bitmap of that name is what a crash of its writer leaves."""
    data = bytearray(path.read_bytes())
    directory, length = directory_of(data)
    at = data.index(name.encode(), directory, directory + length) - 24
    data[at + 15] |= 1
    path.write_bytes(data)


def directory_of(data: bytes | bytearray) -> tuple[int, int]:
    """Where the bitmap directory of an image is, and how long."""
    at = data.index(b"\x23\x85\x28\x75\0\0\0\x18") + 16
    return int.from_bytes(data[at + 8 : at + 16], "big"), int.from_bytes(data[at : at + 8], "big")


def bits_of(path: Path, name: str) -> list[dict[str, Any]]:
    """The stored bitmap of that name, as qemu-nbd shows it."""
    folder = Path(tempfile.mkdtemp())
    socket = folder / "s"
    process = subprocess.Popen(["qemu-nbd", "-r", "-t", "-k", socket, "-f", "qcow2", "-B", name, path])
    try:
        until(lambda: greets(socket), "qemu-nbd answers")
        uri = f"nbd+unix:///?socket={socket}"
        found: list[dict[str, Any]] = json.loads(run("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", uri))
        return found
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder)


def content(path: Path, *options: str) -> bytes:
    """The guest content as qemu-img reads it."""
    raw = path.with_suffix(".content")
    run("qemu-img", "convert", "-U", *(options or ("-f", "qcow2")), "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


async def open_image(path: Path, *, read_only: bool = False, **options: Any) -> Qcow2Driver:
    """The driver on the file ``path``, with its data file if it has one."""
    storage = await FileStorage.open(str(path), read_only=read_only)
    try:
        options["companions"] = [
            await FileStorage.open(str(path.parent / companion.name), read_only=read_only)
            for companion in await Qcow2Driver.companions(storage)
        ]
        return await Qcow2Driver.open(storage, options, read_only=read_only)
    except BaseException:
        await storage.close()
        raise


async def read(driver: Qcow2Driver, offset: int, length: int, backing: bytes = b"") -> bytes:
    """Read through the mapping; what the layer does not decide comes from ``backing``, or is zeroes."""
    result = bytearray(length)
    done = 0
    while done < length:
        at = offset + done
        found = driver.lookup(at, length - done)
        if found is None:
            await driver.load(at)
            continue
        kind, run_length, host_offset = found
        assert 0 < run_length <= length - done
        if kind == DATA:
            result[done : done + run_length] = await driver.data.read(host_offset, run_length)
        elif kind == COMPRESSED:
            start, cluster = await driver.read_compressed(at)
            assert start == at - at % driver.cluster_size
            skip = at - start
            run_length = min(run_length, driver.cluster_size - skip)
            result[done : done + run_length] = cluster[skip : skip + run_length]
        elif kind != 1:
            part = backing[at : at + run_length]
            result[done : done + len(part)] = part
        done += run_length
    return bytes(result)


async def write(driver: Qcow2Driver, offset: int, data: bytes, backing: bytes = b"") -> None:
    """Write, allocating and filling what is not in place."""
    done = 0
    while done < len(data):
        at = offset + done
        found = driver.lookup_writable(at, len(data) - done)
        if found is None:
            await driver.load(at)
            continue
        kind, length, host_offset = found
        end = at + length
        if kind == DATA:
            await driver.data.write(host_offset, data[done : done + length])
        else:
            start = align_down(at, driver.granularity)
            wanted = align_up(end, driver.granularity) - start
            await driver.make_room()
            while (allocation := driver.allocate(start, wanted)) is None:
                await driver.prepare(start, wanted)
            assert allocation.offset == start
            stop = start + allocation.length
            end = min(end, stop)
            inside = max(start, min(stop, driver.size))
            old = bytearray((await read(driver, start, inside - start, backing)).ljust(allocation.length, b"\0"))
            if not allocation.zeroed:  # what a careless engine would leave must not show
                await driver.data.write(allocation.host_offset, b"\xee" * allocation.length)
            old[at - start : end - start] = data[done : done + end - at]
            pieces = [(allocation.host_offset, bytes(old))]
            if allocation.zeroed and not any(old[: at - start]) and not any(old[end - start :]):
                pieces = [(allocation.host_offset + at - start, data[done : done + end - at])]
            await driver.data.write_all(pieces)
            driver.publish(allocation)
        done += end - at


async def change(driver: Qcow2Driver, what: str, offset: int, length: int, **how: bool) -> list[tuple[int, int]]:
    """``zero`` or ``discard`` a range aligned to the granularity; the ``(offset, length)`` that was done."""
    parts, end = [], offset + length
    while offset < end:
        done = getattr(driver, what)(offset, end - offset, **how)
        if done is None:
            await driver.load(offset)
            continue
        if done == 0:
            break
        assert 0 < done <= end - offset
        parts.append((offset, done))
        offset += done
    return parts


async def mapping(driver: Qcow2Driver, start: int = 0, end: int | None = None) -> list[tuple[int, int, int, int]]:
    """``(start, length, kind, host_offset)`` of ``iter_runs``, checked to be contiguous."""
    end = driver.size if end is None else end
    runs: list[tuple[int, int, int, int]] = []
    async for piece in driver.iter_runs(start, end):
        runs += zip(
            piece.start.tolist(),
            piece.length.tolist(),
            piece.kind.tolist(),
            piece.host_offset.tolist(),
            strict=True,
        )
    position = start
    for run_start, length, _, _ in runs:
        assert run_start == position and length > 0
        position += length
    assert position == max(start, end)
    return runs


async def agrees(driver: Qcow2Driver) -> None:
    """``iter_runs`` and ``lookup`` tell the same, but for space reserved for what is unallocated."""
    for start, length, kind, host_offset in await mapping(driver):
        position, end = start, start + length
        while position < end:
            found = driver.lookup(position, end - position)
            if found is None:
                await driver.load(position)
                continue
            where = host_offset + position - start if host_offset >= 0 and kind != COMPRESSED else host_offset
            where = -1 if kind == UNALLOCATED else where
            assert (found[0], found[2]) == (kind, where), (position, found, kind, host_offset)
            position += found[1]


async def random_changes(driver: Qcow2Driver, model: bytearray, count: int, seed: int, backing: bytes = b"") -> None:
    """Random writes, zeroes, discards and flushes on the image and the model alike."""
    rng = random.Random(seed)
    grain = driver.granularity
    for number in range(count):
        offset = rng.randrange(len(model))
        length = min(rng.choice((1, 512, 4096, driver.cluster_size, 3 * driver.cluster_size)), len(model) - offset)
        action = rng.random()
        if action < 0.6:
            data = bytes([1 + number % 255]) * length
            await write(driver, offset, data, backing)
            model[offset : offset + length] = data
        elif action < 0.85:
            offset = align_down(offset, grain)
            length = min(align_up(length, grain), len(model) - offset)
            if action < 0.75:
                parts = await change(driver, "zero", offset, length, unmap=action < 0.68)
            else:
                parts = await change(driver, "discard", offset, length)
            for start, done in parts:
                model[start : start + done] = bytes(done)
        elif action < 0.95:
            assert await read(driver, offset, length, backing) == model[offset : offset + length]
        else:
            await driver.flush()
