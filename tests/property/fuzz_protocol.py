"""A byte-level fuzzer: valid sessions of both roles, mutated.

``python -m tests.property.fuzz_protocol --sessions 100000`` runs it by hand.
Each session must end in events or one ProtocolError. Memory and file descriptors must not grow from the first tenth
of the sessions to the last. A failure prints the seed of its session, which ``--seed`` repeats.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import resource
import struct
import sys
import time
from collections.abc import Callable

from nbdserve.protocol import constants as k
from nbdserve.protocol.client import ClientHandshake, Connected, Failed, Send
from nbdserve.protocol.client_transmission import ClientTransmission
from nbdserve.protocol.codec import EXTENDED, SIMPLE
from nbdserve.protocol.handshake import ServerHandshake, Tls
from tests.protocol.model import BLOCK, FakeExport, ModelServer, directory, info_data, meta_data, option

SIZE = 16 * BLOCK
CONTEXTS = ("base:allocation", "qemu:allocation-depth")
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
WORDS = (0, 1, 511, 512, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 26, (1 << 26) + 1, 1 << 27, (1 << 27) + 1)
MOST_GROWTH = 16 << 20
"""Bytes: several times the largest session, as the allocator keeps what it got; a leak of 200 bytes a session shows."""


def exports() -> FakeExport:
    return FakeExport(size=SIZE)


def a_session(rng: random.Random) -> tuple[bytes, bytes, Callable[[], Callable[[bytes], object]]]:
    """What a client and a server say in a valid session, and how to begin the same client again."""
    mode = rng.randrange(3)
    aim = rng.choice(("connect", "connect", "connect", "list", "info"))

    def begin() -> ClientHandshake:
        if aim == "list":
            return ClientHandshake.list_exports()
        if aim == "info":
            return ClientHandshake.info("disk")
        return ClientHandshake.connect("disk", contexts=CONTEXTS, highest_mode=mode, use_go=bool(mode) or use_go)

    use_go = rng.random() < 0.5
    server, client = ModelServer(directory(exports())), begin()
    said, heard = bytearray(), bytearray(server.handshake.greeting())
    data, connected = bytes(heard), None
    while data:
        events = client.receive(data)
        data = b""
        for event in events:
            if isinstance(event, Send):
                said += event.data
                data += server.receive(event.data)
            elif isinstance(event, Connected):
                connected = event.export
        heard += data
    for _ in range(rng.randrange(4)):
        # options no client of ours sends
        number, name = rng.randrange(13), rng.choice(("disk", "", "absent"))
        extra = rng.choice(
            (option(number), option(number, info_data(name, 1, 2, 3)), option(number, meta_data(name, "base:")))
        )
        said[4:4] = extra
    if connected is None:
        return bytes(said), bytes(heard), lambda: begin().receive
    transmission = ClientTransmission(mode, [number for number, _ in connected.contexts])
    todo = [a_request(rng, mode) for _ in range(rng.randrange(1, 8))]
    for command, offset, length, flags, only in todo:
        _, header = transmission.request(command, offset, length, flags=flags, only=only)
        request = header + (bytes([7]) * length if command == k.CMD_WRITE else b"")
        said += request
        heard += server.receive(request)
    said += transmission.disconnect()

    def again() -> Callable[[bytes], object]:
        handshake, after = begin(), ClientTransmission(mode, [number for number, _ in connected.contexts])
        for command, offset, length, flags, only in todo:
            after.request(command, offset, length, flags=flags, only=only)
        entered = False

        def receive(data: bytes) -> object:
            nonlocal entered
            if entered:
                return after.receive(data)
            events = handshake.receive(data)
            if events and isinstance(events[-1], Connected):
                entered = True
                return after.receive(handshake.leftover)
            assert not any(isinstance(event, Failed) for event in events[:-1])
            return events

        return receive

    return bytes(said), bytes(heard), again


def a_request(rng: random.Random, mode: int) -> tuple[int, int, int, int, tuple[int, ...]]:
    command = rng.choice(
        (k.CMD_READ, k.CMD_READ, k.CMD_WRITE, k.CMD_FLUSH, k.CMD_TRIM, k.CMD_WRITE_ZEROES, k.CMD_CACHE, 7)
    )
    if mode == SIMPLE and command == k.CMD_BLOCK_STATUS:
        command = k.CMD_READ
    length = rng.choice((1, 512, BLOCK, 3 * BLOCK))
    only = (rng.randrange(2),) if mode == EXTENDED and command == k.CMD_BLOCK_STATUS and rng.random() < 0.5 else ()
    return command, rng.randrange(SIZE - length + 1), length, rng.choice((0, 0, 1)), only


def mutate(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(7):
            case 0:
                changed[at : at + 1] = bytes([rng.choice(INTERESTING)])
            case 1:
                changed[at : at + 4] = struct.pack(">I", rng.choice(WORDS))
            case 2:
                changed[at : at + 8] = struct.pack(">Q", rng.choice(WORDS) << rng.choice((0, 0, 32, 31)))
            case 3:
                del changed[at : at + rng.randrange(40)]
            case 4:
                changed[at:at] = rng.randbytes(rng.randrange(40))
            case 5:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.randrange(64)]
            case _ if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def feed(rng: random.Random, data: bytes, receive: Callable[[bytes], object]) -> None:
    if rng.random() < 0.5:
        receive(data)
        return
    while data:
        size = rng.choice((1, 3, 28, 100, 5000))
        receive(data[:size])
        data = data[size:]


def run_session(seed: int) -> None:
    """One session: the server hears a mutated client, the client a mutated server, a TLS server the same bytes."""
    rng = random.Random(seed)
    said, heard, client = a_session(rng)
    feed(rng, mutate(rng, said), ModelServer(directory(exports())).receive)
    feed(rng, mutate(rng, heard), client())
    tls = ServerHandshake(directory(exports()), tls=rng.choice((Tls.ON, Tls.REQUIRED)))
    feed(rng, mutate(rng, said), tls.receive)


def memory() -> int:
    """Bytes resident after a collection."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def run(sessions: int, first_seed: int) -> str:
    """Run them; what was seen, in one line."""
    warm = max(1, sessions // 10)
    started = time.monotonic()
    held = opened = 0
    for number in range(sessions):
        if number == warm:
            held, opened = memory(), descriptors()
        try:
            run_session(first_seed + number)
        except BaseException:
            print(f"session failed: --sessions 1 --seed {first_seed + number}", file=sys.stderr)
            raise
    grown, leaked = memory() - held, descriptors() - opened
    assert grown < MOST_GROWTH, f"memory has grown by {grown} bytes"
    assert leaked == 0, f"{leaked} file descriptors leaked"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    took = time.monotonic() - started
    return (
        f"{sessions} sessions in {took:.0f} s: no unhandled exception; "
        f"memory {grown >> 10:+d} KiB, at most {most >> 20} MiB; descriptors {leaked:+d}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fuzz the protocol with mutated sessions.")
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(run(arguments.sessions, arguments.seed))
