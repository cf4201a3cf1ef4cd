"""One round: our node and qemu-io write the same image in turns; everybody must agree on every byte."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nbdserve.block.graph import open_image
from nbdserve.block.node import Node
from nbdserve.block.spec import ImageSpec
from tests.support import images
from tests.support.geometries import KITS, Geometry, make, spec_of, stock_of
from tests.support.model import ModelDisk
from tests.support.unlocking import remembered_keys
from tests.support.workload import Mix, Workload, read_all

SESSIONS = 5
"""Times the image is opened and closed for the operations of a round."""


class DifferentialFailure(AssertionError):
    """Somebody disagrees; the message says in which round, so that it can be made again."""


@dataclass(frozen=True)
class Policy:
    """How the image is opened for a session."""

    discard: str
    detect_zeroes: str
    cache: str

    @classmethod
    def random(cls, rng: random.Random) -> Policy:
        """Any policy; mostly that of a server behind a file system that trims."""
        return cls(
            rng.choice(("unmap", "unmap", "unmap", "ignore")),
            rng.choice(("off", "off", "on", "unmap")),
            rng.choice(("writeback", "unsafe")),
        )


def run_round(geometry: Geometry, seed: int, operations: int, keep: Path | None = None) -> str:
    """Make the image, work on it, compare; a line that says what was done. ``keep``: where a failing image is left."""
    folder = Path(tempfile.mkdtemp(dir=keep or images.SCRATCH))
    round_ = _Round(geometry, seed, operations, folder)
    try:
        with remembered_keys():
            done = asyncio.run(round_.run())
    except Exception as error:
        where = f"\nkept: {folder}" if keep else ""
        raise DifferentialFailure(
            f"geometry {geometry.name}, seed {seed}, operations {operations}, step: {round_.step}\n"
            f"{type(error).__name__}: {error}{where}"
        ) from error
    else:
        keep = None
        return done
    finally:
        if keep is None:
            shutil.rmtree(folder)


class _Round:
    def __init__(self, geometry: Geometry, seed: int, operations: int, folder: Path) -> None:
        self.geometry = geometry
        self.operations = operations
        self.folder = folder
        self.rng = random.Random(f"{geometry.name}/{seed}")
        self.path, self.first = make(geometry, folder, seed)
        self.stock = stock_of(geometry, self.path)
        self.size = len(self.first)
        self.step = "made"

    async def run(self) -> str:
        geometry = self.geometry
        model = ModelDisk(self.size, self.first)
        await self._same_as_ours(self.first)
        for session in range(SESSIONS):
            await self._session(session, model)
        content = model.expected()
        self._agreed(content)
        for turn in range(2):
            if geometry.stock == "rw":
                content = self._qemu_writes(content, turn)
                await self._same_as_ours(content)
                model.adopt(content, learn=True)
            await self._session(SESSIONS + turn, model)
            content = model.expected()
            self._agreed(content)
        if geometry.snapshot:
            await self._snapshot_is_untouched()
        return f"{geometry.name}: {self.operations} operations, {self.path.stat().st_blocks // 2} KiB on disk"

    async def _session(self, session: int, model: ModelDisk) -> None:
        """Open, work, close, let qemu-img judge, and take what is there for the truth about discarded sectors."""
        policy = Policy.random(self.rng)
        self.step = f"session {session}, {policy}"
        node = await self._open(policy)
        mix = Mix(in_flight=self.rng.choice((1, 4, 8)), largest=self.rng.choice((64 << 10, 1 << 20)))
        workload = Workload(node, model, random.Random(self.rng.random()), mix=mix)
        try:
            await workload.run(self.operations // SESSIONS)
            await workload.verify()
        finally:
            await node.close()
        self.step += ", closed"
        self._check()
        await self._check_by_ours()
        model.resolve(await self._truth())

    async def _open(self, policy: Policy) -> Node:
        return await open_image(
            spec_of(
                self.geometry,
                self.path,
                discard=policy.discard,
                detect_zeroes=policy.detect_zeroes,
                cache=policy.cache,
            )
        )

    def _check(self) -> None:
        """Whoever of the others knows the format finds nothing wrong."""
        if self.geometry.stock and KITS[self.geometry.fmt].stock_check:
            self.stock.check()

    async def _check_by_ours(self) -> None:
        node = await open_image(spec_of(self.geometry, self.path, read_only=True))
        try:
            if node.top.can("check"):
                result = await node.top.check()
                if result.corruptions or result.check_errors or result.leaks:
                    raise DifferentialFailure(f"our check: {result.messages[:5]}")
        finally:
            await node.close()

    async def _truth(self) -> bytes:
        """The content as others read it, or where there is nobody, as we do after opening it anew."""
        if self.geometry.stock:
            return self.stock.raw_content(self.folder)
        if self.geometry.reader is not None:
            return self.geometry.reader(self.path)
        node = await open_image(spec_of(self.geometry, self.path, read_only=True))
        try:
            return await read_all(node, node.size)
        finally:
            await node.close()

    async def _same_as_ours(self, content: bytes) -> None:
        """What our node reads, read-only, in whole and at random places, is ``content``."""
        node = await open_image(spec_of(self.geometry, self.path, read_only=True))
        try:
            if node.size != self.size:
                raise DifferentialFailure(f"the disk has {node.size} bytes")
            _equal(await read_all(node, node.size, 3 << 20), content, "our read")
            for _ in range(20):
                offset = self.rng.randrange(node.size)
                length = min(node.size - offset, self.rng.choice((1, 511, 4096, 70001)))
                _equal(await node.read(offset, length), content[offset : offset + length], f"our read at {offset:#x}")
        finally:
            await node.close()

    def _agreed(self, content: bytes) -> None:
        """qemu-img, or another reader, compares the image with the model's content and finds them identical."""
        self.step += ", compare"
        if self.geometry.reader is not None:
            _equal(self.geometry.reader(self.path), content, "the other reader")
        if not self.geometry.stock:
            return
        expected = self.folder / "expected.raw"
        expected.write_bytes(content)
        self.stock.compare(expected)
        expected.unlink()

    def _qemu_writes(self, content: bytes, turn: int) -> bytes:
        """qemu-io goes on with our image; what it holds then."""
        self.step = f"qemu-io, turn {turn}"
        after = bytearray(content)
        commands = images.random_qemu_io(self.rng, len(after), 30, after, zeroes=self.geometry.stock_zeroes)
        self.stock.qemu_io(commands)
        self._check()
        return bytes(after)

    async def _snapshot_is_untouched(self) -> None:
        self.step = "snapshot"
        target = self.folder / "snapshot.raw"
        images.convert(self.path, "qcow2", target, "raw", "-l", "first")
        _equal(target.read_bytes(), self.first, "qemu-img's read of the snapshot")
        node = await open_image(ImageSpec(str(self.path), format="qcow2", snapshot="first"))
        try:
            _equal(await read_all(node, node.size), self.first, "our read of the snapshot")
        finally:
            await node.close()


def _equal(found: bytes | bytearray, wanted: bytes, what: str) -> None:
    if found != wanted:
        at = next(
            (i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted))
        )
        raise DifferentialFailure(
            f"{what}: {len(found)} bytes for {len(wanted)}, first wrong at {at:#x}: "
            f"{bytes(found[at : at + 16]).hex()} for {wanted[at : at + 16].hex()}"
        )
