"""``nbdserve demo``: a small copy-on-write chain, served, with what to try on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import typer

from nbdserve.app import ExportPlan, Plan, run
from nbdserve.block.graph import open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.nbd_client import Client
from nbdserve.errors import ConfigError
from nbdserve.formats.registry import driver_for
from nbdserve.server.addresses import Address, TcpAddress, unix_address
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB, format_size

DISK_SIZE: Final = 64 * MIB
BASE: Final = "base.qcow2"
OVERLAY: Final = "overlay.qcow2"
SOCKET: Final = "nbd.sock"

_BASE_CONTENT: Final = {
    0: f"This was written into {BASE}, the backing file.\n".encode(),
    1 * MIB: b"base" * (256 * KIB),
    8 * MIB: b"base" * (64 * KIB),
}
_OVERLAY_CONTENT: Final = {
    512: f"This was written through {OVERLAY}, and the cluster around it copied up.\n".encode(),
    1 * MIB + 128 * KIB: b"over" * (64 * KIB),
}
_DEPTHS: Final = {0: "nowhere: reads as zeroes", 1: OVERLAY, 2: BASE}


def demo(
    *,
    directory: Annotated[
        str | None,
        typer.Option(
            "--dir", metavar="DIR", help="Where the images are made, and kept. Default: a temporary directory.",
            show_default=False,
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Read from the server with the built-in client, show what it got, and exit.")
    ] = False,
) -> int:  # fmt: skip
    """Make a qcow2 image and an overlay over it, serve them, and say what to try."""
    with contextlib.ExitStack() as stack:
        if directory is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdserve-demo-"))
        place = Path(directory).absolute()
        asyncio.run(build(place))
        addresses: list[Address] = [unix_address(str(place / SOCKET)), TcpAddress("127.0.0.1", 0)]
        image = ImageSpec(str(place / OVERLAY), "qcow2", discard="unmap")
        export = ExportPlan("demo", image, "nbdserve's demonstration disk", allocation_depth=True)
        plan = Plan([export], addresses, exit_last=once)
        return (
            _read_once(plan) if once else run(plan, lambda addresses: print(_what_to_try(place, addresses), flush=True))
        )


async def build(directory: Path) -> None:
    """Make the two images, unless the overlay is there already. ConfigError when a base of someone else's is."""
    if _prepare(directory):
        await _make(directory / BASE, {}, _BASE_CONTENT)
        await _make(directory / OVERLAY, {"backing_file": BASE, "backing_fmt": "qcow2"}, _OVERLAY_CONTENT)


def _prepare(directory: Path) -> bool:
    """Whether there is something to be made."""
    if (directory / OVERLAY).exists():
        return False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / BASE).touch(exist_ok=False)
    except FileExistsError as error:
        raise ConfigError(f"{error.filename} exists; give --dir another directory") from None
    return True


async def _make(path: Path, options: dict[str, str], content: dict[int, bytes]) -> None:
    storage = await FileStorage.open(str(path), create=True)
    try:
        await driver_for("qcow2").create(storage, DISK_SIZE, options)
    finally:
        await storage.close()
    node = await open_image(ImageSpec(str(path), "qcow2"))
    try:
        for offset, data in content.items():
            await node.write(offset, data)
        await node.flush()
    finally:
        await node.close()


def _what_to_try(directory: Path, addresses: list[Address]) -> str:
    unix, tcp = (shlex.quote(address.uri("demo")) for address in addresses)
    return f"""\
Serving {directory / OVERLAY} over {BASE}, {format_size(DISK_SIZE)}, at
  {unix}
  {tcp}
Try, in another terminal:
  nbdinfo {unix}
  nbdinfo --map=qemu:allocation-depth {unix}
  nbdcopy --progress {tcp} copy.raw
  qemu-img map --output json {tcp}
  qemu-io -f raw -c 'write -P 0x61 16M 1M' -c 'read -P 0x61 16M 1M' {unix}
Ctrl-C stops the server."""


def _read_once(plan: Plan) -> int:
    """Serve, and be the one client; its leaving ends the server."""
    failures: list[BaseException] = []

    def client(address: Address) -> None:
        try:
            _show(address, print)
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    threads: list[threading.Thread] = []

    def ready(addresses: list[Address]) -> None:
        threads.append(threading.Thread(target=client, args=addresses[:1]))
        threads[0].start()

    run(plan, ready)
    threads[0].join()
    if failures:
        raise failures[0]
    return 0


def _show(address: Address, say: Callable[[str], None]) -> None:
    with Client(address, "demo", ("base:allocation", "qemu:allocation-depth")) as client:
        size = client.export.size
        say(f"Connected to {address.uri('demo')}: {format_size(size)}")
        for offset in (0, 512):
            text = client.read(offset, 512).rstrip(b"\0").decode()
            say(f"At {offset}: {text.strip()}")
        say("Where the disk's data is:")
        offset = 0
        while offset < size:
            for length, depth in client.block_status(offset, size - offset)["qemu:allocation-depth"]:
                say(f"  {offset:>10} {format_size(length):>9}  {_DEPTHS.get(depth, depth)}")
                offset += length
        expected = bytearray(DISK_SIZE)
        for content in (_BASE_CONTENT, _OVERLAY_CONTENT):
            for start, data in content.items():
                expected[start : start + len(data)] = data
        if any(client.read(at, MIB) != expected[at : at + MIB] for at in range(0, size, MIB)):
            raise ConfigError(
                f"{address}: the data read is not what the demonstration wrote; give --dir a new directory"
            )
        say(f"All {format_size(size)} read and compared: equal.")
