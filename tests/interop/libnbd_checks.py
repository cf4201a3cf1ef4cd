"""Checks of a server through libnbd's Python bindings: ``/usr/bin/python3 libnbd_checks.py CHECK URI``.

The bindings belong to the system's Python, so this file is a script of its own and imports nothing of the project.
The export is the disk of the ``content`` fixture: 16 MiB, zeroes in [4, 6) and [10, 11) MiB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import nbd

MIB = 1 << 20
SIZE = 16 * MIB
BASE = "base:allocation"
DEPTH = "qemu:allocation-depth"


def connect(uri: str, *contexts: str, structured: bool = True) -> Any:
    handle = nbd.NBD()
    handle.set_request_structured_replies(structured)
    for context in contexts:
        handle.add_meta_context(context)
    handle.set_strict_mode(0)  # libnbd would refuse some of the requests itself
    handle.connect_uri(uri)
    return handle


def fails(action: Callable[[], Any], errno: str) -> None:
    try:
        action()
    except nbd.Error as error:
        assert error.errno == errno, f"{error.errno}, not {errno}: {error.string}"
        return
    raise AssertionError(f"succeeded, {errno} was due")


def structured_reads(uri: str) -> None:
    """Data and holes cover the request once, in any order; DF brings one chunk."""
    handle = connect(uri)
    assert handle.get_structured_replies_negotiated()
    plain = handle.pread(4 * MIB, 3 * MIB)
    seen = bytearray(b"\xaa" * (4 * MIB))
    covered = []

    def chunk(data: bytes, offset: int, status: int, _error: object) -> int:
        assert status in {nbd.READ_DATA, nbd.READ_HOLE}
        seen[offset - 3 * MIB : offset - 3 * MIB + len(data)] = bytes(len(data)) if status == nbd.READ_HOLE else data
        covered.append((offset, len(data)))
        return 0

    handle.pread_structured(4 * MIB, 3 * MIB, chunk)
    assert bytes(seen) == plain
    end = 3 * MIB
    for offset, length in sorted(covered):
        assert offset == end
        end += length
    assert end == 7 * MIB
    covered.clear()
    assert handle.can_df()
    handle.pread_structured(MIB, 3 * MIB + MIB // 2, chunk, nbd.CMD_FLAG_DF)
    assert len(covered) == 1
    handle.shutdown()


def simple_replies(uri: str) -> None:
    """Without structured replies: reads, writes and errors all the same."""
    handle = connect(uri, structured=False)
    assert not handle.get_structured_replies_negotiated()
    assert not handle.can_df()
    handle.pwrite(b"simple" * 100, 12345)
    assert handle.pread(600, 12345) == b"simple" * 100
    fails(lambda: handle.pread(512, SIZE), "EINVAL")
    assert handle.pread(6, 12345) == b"simple"
    handle.shutdown()


def fua_and_flush(uri: str) -> None:
    """FUA on everything that changes data, then a flush; a second connection sees it all."""
    handle = connect(uri)
    assert handle.can_fua()
    assert handle.can_flush()
    handle.pwrite(b"\x11" * 4096, 0, nbd.CMD_FLAG_FUA)
    handle.zero(4096, 4096, nbd.CMD_FLAG_FUA)
    handle.trim(65536, 65536, nbd.CMD_FLAG_FUA)
    handle.flush()
    other = connect(uri)
    assert handle.can_multi_conn()
    assert other.pread(8192, 0) == b"\x11" * 4096 + bytes(4096)
    for each in (handle, other):
        each.shutdown()


def zeroes(uri: str) -> None:
    """WRITE_ZEROES at any alignment, with NO_HOLE and FAST_ZERO; the neighbours keep their bytes."""
    handle = connect(uri)
    assert handle.can_zero()
    for offset, length, flags in (
        (MIB + 1, 3, 0),
        (MIB + 4096, 70000, 0),
        (2 * MIB, 2 * MIB, nbd.CMD_FLAG_NO_HOLE),
        (7 * MIB + 511, MIB, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE),
        (SIZE - 1, 1, 0),
    ):
        before = handle.pread(length + 2 if offset + length < SIZE else length + 1, offset - 1)
        handle.zero(length, offset, flags)
        after = handle.pread(len(before), offset - 1)
        assert after == before[:1] + bytes(length) + before[1 + length :]
    if handle.can_fast_zero():
        before = handle.pread(65536, 12 * MIB)
        try:
            handle.zero(65536, 12 * MIB, nbd.CMD_FLAG_FAST_ZERO)
        except nbd.Error as error:
            assert error.errno in {"EOPNOTSUPP", "ENOTSUP"}, error.errno
            assert handle.pread(65536, 12 * MIB) == before
        else:
            assert handle.pread(65536, 12 * MIB) == bytes(65536)
    handle.shutdown()


def trim_and_cache(uri: str) -> None:
    """TRIM and CACHE succeed, change nothing around them, and whole requests need no alignment."""
    handle = connect(uri)
    assert handle.can_trim()
    handle.pwrite(b"\x22" * 3 * 65536, 8 * MIB)
    handle.trim(65536, 8 * MIB + 65536)
    assert handle.pread(65536, 8 * MIB) == b"\x22" * 65536
    assert handle.pread(65536, 8 * MIB + 2 * 65536) == b"\x22" * 65536
    assert handle.pread(65536, 8 * MIB + 65536) in (b"\x22" * 65536, bytes(65536))
    handle.trim(1, 1)
    if handle.can_cache():
        handle.cache(MIB, 0)
    handle.shutdown()


def block_status(uri: str) -> None:
    """Extents of base:allocation: from the offset, not empty, what is ZERO reads as zeroes; REQ_ONE gives one."""
    handle = connect(uri, BASE)
    assert handle.can_meta_context(BASE)
    found: list[tuple[int, int]] = []

    def extent(context: str, offset: int, entries: list[int], _error: object) -> int:
        assert context == BASE
        found.extend(zip(entries[0::2], entries[1::2], strict=True))
        return 0

    offset = 0
    while offset < SIZE:
        found.clear()
        handle.block_status(SIZE - offset, offset, extent)
        assert found
        for length, flags in found:
            assert length > 0
            if flags & nbd.STATE_ZERO:
                assert handle.pread(length, offset) == bytes(length)
            offset += length
    assert offset == SIZE
    found.clear()
    handle.block_status(2 * MIB, 3 * MIB, extent, nbd.CMD_FLAG_REQ_ONE)
    assert len(found) == 1
    assert found[0][0] <= 2 * MIB
    handle.shutdown()


def both_contexts(uri: str) -> None:
    """base:allocation and qemu:allocation-depth in one request, cut at one common end."""
    handle = connect(uri, BASE, DEPTH)
    assert handle.can_meta_context(BASE)
    assert handle.can_meta_context(DEPTH)
    seen: dict[str, list[int]] = {}

    def extent(context: str, _offset: int, entries: list[int], _error: object) -> int:
        assert context not in seen
        seen[context] = entries
        return 0

    offset, depths = 0, set()
    while offset < SIZE:
        seen.clear()
        handle.block_status(SIZE - offset, offset, extent)
        assert set(seen) == {BASE, DEPTH}
        ends = {sum(entries[0::2]) for entries in seen.values()}
        assert len(ends) == 1, seen
        depths.update(seen[DEPTH][1::2])
        offset += ends.pop()
    assert depths <= {0, 1, 2, 3}
    assert 1 in depths
    handle.shutdown()


def errors(uri: str) -> None:
    """The specification's error codes; the connection lives on after each."""
    handle = connect(uri)
    fails(lambda: handle.pread(512, SIZE - 256), "EINVAL")
    fails(lambda: handle.pwrite(b"x" * 512, SIZE - 256), "ENOSPC")
    fails(lambda: handle.zero(512, SIZE), "ENOSPC")
    fails(lambda: handle.trim(512, SIZE), "EINVAL")
    fails(lambda: handle.pread(512, (1 << 63) - 512), "EINVAL")
    fails(lambda: handle.pwrite(b"x" * 512, 0, nbd.CMD_FLAG_REQ_ONE), "EINVAL")
    assert len(handle.pread(512, SIZE - 512)) == 512
    handle.shutdown()


def read_only(uri: str) -> None:
    """Everything that would change a read-only export is EPERM."""
    handle = connect(uri)
    assert handle.is_read_only()
    before = handle.pread(4096, 0)
    fails(lambda: handle.pwrite(b"x" * 512, 0), "EPERM")
    fails(lambda: handle.zero(512, 0), "EPERM")
    fails(lambda: handle.trim(512, 0), "EPERM")
    assert handle.pread(4096, 0) == before
    handle.shutdown()


def large_requests(uri: str) -> None:
    """64 MiB, the most libnbd sends, written and read in one request (the export has 80 MiB)."""
    handle = connect(uri)
    data = bytes(range(1, 256)) * (64 * MIB // 255 + 1)
    data = data[: 64 * MIB]
    handle.pwrite(data, 8 * MIB + 1)
    assert handle.pread(64 * MIB, 8 * MIB + 1) == data
    handle.shutdown()


def in_flight(uri: str) -> None:
    """Hundreds of overlapping requests at once; each is answered once, with its own data."""
    handle = connect(uri)
    step = 8192
    buffers = []
    for index in range(512):
        buffer = nbd.Buffer(step)
        buffers.append((index, buffer, handle.aio_pread(buffer, index * step)))
    for index, buffer, cookie in buffers:
        while not handle.aio_command_completed(cookie):
            handle.poll(-1)
        assert bytes(buffer.to_bytearray()) == bytes(handle.pread(step, index * step))
    handle.shutdown()


CHECKS = (
    structured_reads,
    simple_replies,
    fua_and_flush,
    zeroes,
    trim_and_cache,
    block_status,
    both_contexts,
    errors,
    read_only,
    large_requests,
    in_flight,
)

if __name__ == "__main__":
    name, target = sys.argv[1:]
    {check.__name__: check for check in CHECKS}[name](target)
