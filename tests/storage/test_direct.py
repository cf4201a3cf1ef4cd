"""Direct I/O at every alignment, and the gate between whole and partial blocks."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdserve.storage.direct import DirectFile, WriteGate
from nbdserve.units import MIB


@pytest.fixture
def direct_fd(tmp_path: Path) -> Iterator[int]:
    try:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT here")
    yield fd
    os.close(fd)


def read(file: DirectFile, fd: int, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xff" * length)
    file.read_fully(fd, offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("alignment", [512, 4096])
def test_any_offset_and_length(direct_fd: int, alignment: int) -> None:
    file = DirectFile(alignment, fixed_size=False)
    chance = random.Random(1)
    model = bytearray()
    for _ in range(120):
        offset = chance.choice([chance.randrange(3 * MIB), chance.randrange(700) * 4096, len(model)])
        length = chance.choice([0, 1, 511, 512, 4096, 5000, MIB - 1, MIB, MIB + 513])
        data = chance.randbytes(length)
        file.write_fully(direct_fd, offset, data)
        if data:
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset : offset + length] = data
        assert os.fstat(direct_fd).st_size == len(model)
        start = chance.randrange(len(model) + 1)
        count = chance.choice([1, 512, 4097, 2 * MIB + 1])
        assert read(file, direct_fd, start, count) == model[start : start + count].ljust(count, b"\0")
    assert read(file, direct_fd, 0, len(model)) == model


def test_threads_that_share_blocks(direct_fd: int) -> None:
    file = DirectFile(4096, fixed_size=False)
    size = 1 << 18
    file.write_fully(direct_fd, 0, bytes(size))
    pieces = [(start, bytes([1 + start % 255]) * 1000) for start in range(0, size - 1000, 1000)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: file.write_fully(direct_fd, *piece), pieces))
    content = read(file, direct_fd, 0, size)
    for start, data in pieces:
        assert content[start : start + 1000] == data


def test_the_gate_lets_whole_blocks_pass_together_and_partial_ones_alone() -> None:
    gate = WriteGate()
    inside: set[str] = set()
    wrong: list[set[str]] = []

    def share(name: str) -> None:
        with gate.shared():
            inside.add(name)
            time.sleep(0.001)
            if any(other.startswith("alone") for other in inside):
                wrong.append(set(inside))
            inside.discard(name)

    def alone(name: str) -> None:
        with gate.alone():
            inside.add(name)
            time.sleep(0.001)
            if len(inside) != 1:
                wrong.append(set(inside))
            inside.discard(name)

    with ThreadPoolExecutor(8) as pool:
        for turn in range(60):
            pool.submit(alone if turn % 3 == 0 else share, f"{'alone' if turn % 3 == 0 else 'shared'}-{turn}")
    assert not wrong

    together = threading.Barrier(3, timeout=60)

    def meet() -> None:
        with gate.shared():
            together.wait()

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(meet) for _ in range(3)]:
            future.result()
