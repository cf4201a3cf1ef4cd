"""Measurements that need a process of their own: in the one that runs the tests, freed memory hides growth."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from nbdserve.protocol.constants import CMD_READ, CMD_WRITE
from nbdserve.server.server import ServerLimits
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import GIB, MIB
from tests.server.clients import (
    Gated,
    old_style,
    raw,
    read_exactly,
    resident,
    serving,
    simple_request,
)


def measure(scenario: str, *arguments: str) -> dict[str, float]:
    """Run a scenario in a fresh process; its figures."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.memory", scenario, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


async def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, path)
    await old_style(sock)
    return sock


async def unread(folder: Path, kind: str) -> dict[str, float]:
    """2,000 reads of 1 MiB by a client that never takes a reply; another one goes on."""
    storage = (Gated if kind == "cold" else MemoryStorage)(b"x" * MIB, size=4 * GIB)
    async with serving(folder, raw(storage)) as served:
        mute, other = await _connect(served.path), await _connect(served.path)
        before = resident()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(mute, b"".join(simple_request(CMD_READ, number, 0, MIB) for number in range(2000)))
        peak = before
        for number in range(50):
            await loop.sock_sendall(other, simple_request(CMD_READ, number, 0, 512))
            await read_exactly(other, 16 + 512)
            await asyncio.sleep(0.01)
            peak = max(peak, resident())
        mute.close()
        other.close()
    return {"growth": peak - before}


async def clients(folder: Path, count: str) -> dict[str, float]:
    """``count`` clients in transmission, each of which then reads once; ``seconds`` are of processor time."""
    async with serving(folder, raw(MemoryStorage(b"x" * MIB)), limits=ServerLimits(max_handshakes=10_000)) as served:
        (await _connect(served.path)).close()
        before = resident()
        socks = [await _connect(served.path) for _ in range(int(count))]
        growth = resident() - before
        began = time.process_time()
        loop = asyncio.get_running_loop()
        for number, sock in enumerate(socks):
            await loop.sock_sendall(sock, simple_request(CMD_READ, number, number * 512, 512))
        for sock in socks:
            reply = await read_exactly(sock, 16 + 512)
            assert reply[16:] == b"x" * 512
        seconds = time.process_time() - began
        for sock in socks:
            sock.close()
    return {"growth": growth, "seconds": seconds}


async def hanging(folder: Path) -> dict[str, float]:
    """30 writes of 4 MiB from as many clients, to a storage that hangs."""
    storage = Gated(size=4 * MIB)
    limits = ServerLimits(request_memory=32 * MIB)
    async with serving(folder, raw(storage), limits=limits) as served:
        socks = [await _connect(served.path) for _ in range(30)]
        storage.gate.clear()
        before = resident()
        head, data = simple_request(CMD_WRITE, 1, 0, 4 * MIB), bytes(MIB)
        loop = asyncio.get_running_loop()

        async def send(sock: socket.socket) -> None:
            await loop.sock_sendall(sock, head)
            for _ in range(4):
                await loop.sock_sendall(sock, data)

        sending = [asyncio.create_task(send(sock)) for sock in socks]
        await asyncio.wait(sending, timeout=0.5)
        growth = resident() - before
        storage.gate.set()
        for sock in socks:
            assert (await read_exactly(sock, 16))[4:8] == bytes(4)
        for sock in socks:
            sock.close()
    return {"growth": growth}


def main(scenario: str, *arguments: str) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        figures = runner.run(
            {"unread": unread, "clients": clients, "hanging": hanging}[scenario](Path(folder), *arguments)
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
