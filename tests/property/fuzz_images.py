"""``python -m tests.property.fuzz_images``: damaged and hostile images of a format, opened, read, checked and written.

Mutations change bits, words and stretches of good images, cut them and lengthen them. The sweep sets each number of the
header (``Kit.fields``) to its extremes. Every such image opens and reads, or is refused with an ImageError that names
field and value, in 2 s of processor time and 64 MiB over the start. What is refused, or only read, is not changed, and
no other file is touched either way.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdserve.block.graph import open_alone, open_image
from nbdserve.block.node import Node
from nbdserve.errors import ConfigError, ImageError, RequestError
from nbdserve.storage.file import FileStorage
from nbdserve.units import KIB, MIB
from tests.support import images
from tests.support.geometries import KITS, Field, Geometry, build, spec_of
from tests.support.unlocking import remembered_keys

SECONDS = 2.0
"""Of processor time, to open an image and read from it, or to open it and write to it."""
MEMORY = 64 * MIB
"""Over what the process had before."""
CHECK_SECONDS = 10.0
CHECK_MEMORY = 256 * MIB
HANG_SECONDS = 60
"""On the clock, for whatever waits for ever without using the processor."""
ADDRESS_SPACE = 4 << 30
"""On top of what is mapped at the start: an allocation without bounds fails instead of taking the machine down."""
BATCH = 20
CANARY = b"no image names this file"


class FuzzFailure(AssertionError):
    """An image was not treated as it must be; the message says which, so that it can be made again."""


@dataclass(frozen=True)
class Case:
    """One image to make. ``field`` and ``value`` belong to the sweep; without them it is a mutation."""

    geometry: Geometry
    seed: int
    field: Field | None = None
    value: int = 0

    def __str__(self) -> str:
        what = f", {self.field.name} = {self.value:#x}" if self.field else ""
        return f"geometry {self.geometry.name}, seed {self.seed}{what}"

    def contents(self) -> list[bytearray]:
        """The files of the image."""
        contents = [bytearray(content) for content in build(self.geometry).contents]
        seal = KITS[self.geometry.fmt].seal
        if self.field is not None:
            at = self.field.offset % len(contents[self.field.file])
            contents[self.field.file][at : at + self.field.size] = self.value.to_bytes(
                self.field.size, self.field.order
            )
            if seal is not None:
                seal(contents)
            return contents
        rng = random.Random(f"{self.geometry.name}/{self.seed}")
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            _mutate(rng, rng.choice(contents) if rng.random() < 0.3 else contents[0])
        if seal is not None and rng.random() < 0.7:
            seal(contents)
        if rng.random() < 0.1:
            _resize(rng, rng.choice(contents))
        return contents


def sweep(geometry: Geometry) -> Iterator[Case]:
    """Every field of the header, at its extremes and beside what it is."""
    contents = build(geometry).contents
    for field in KITS[geometry.fmt].fields:
        if field.file >= len(contents) or not -len(contents[field.file]) <= field.offset < len(contents[field.file]):
            continue
        at = field.offset % len(contents[field.file])
        now = int.from_bytes(contents[field.file][at : at + field.size], field.order)
        most = (1 << 8 * field.size) - 1
        near = {now - 1, now + 1, now << 1, now ^ (most + 1 >> 1)}
        for value in sorted({0, 1, 2, most >> 1, (most >> 1) + 1, most - 1, most} | {n & most for n in near}):
            if value != now:
                yield Case(geometry, 0, field, value)


def _mutate(rng: random.Random, content: bytearray) -> None:
    """One change, most often where headers and tables are."""
    if not content:
        return
    span = rng.choice((128, 128, 512, 4 * KIB, 64 * KIB, len(content)))
    at = rng.randrange(min(span, len(content)))
    if rng.random() < 0.15:
        at = len(content) - 1 - min(at, len(content) - 1)
    way = rng.randrange(6)
    if way == 0:
        content[at] ^= 1 << rng.randrange(8)
    elif way == 1:
        content[at] = rng.randrange(256)
    elif way in (2, 3):
        size = rng.choice((2, 4, 8))
        at -= at % size
        most = (1 << 8 * size) - 1
        order = rng.choice(("little", "big"))
        now = int.from_bytes(content[at : at + size], order)
        value = rng.choice(
            (0, 1, 2, most >> 1, most - 1, most, now + 1, now - 1, now << 1, 1 << rng.randrange(8 * size),
             rng.randrange(most), rng.randrange(len(content)), rng.randrange(len(content)) & ~511)
        ) & most  # fmt: skip
        content[at : at + size] = value.to_bytes(size, order)[: len(content) - at]
    else:
        length = min(rng.choice((4, 16, 64, 512)), len(content) - at)
        other = rng.randrange(len(content) - length + 1)
        content[at : at + length] = content[other : other + length] if way == 4 else bytes(length)


def _resize(rng: random.Random, content: bytearray) -> None:
    if rng.random() < 0.7:
        del content[rng.choice((rng.randrange(len(content) + 1), rng.randrange(min(len(content), 4 * KIB) + 1))) :]
    else:
        content.extend(bytes(rng.choice((1, 511, 512, 4096, 65536))))


# --- one image -------------------------------------------------------------------------------------------------------


def run_case(case: Case, folder: Path) -> str:
    """Try the image in the empty ``folder``; what came of it. FuzzFailure."""
    image = build(case.geometry)
    path = image.write_to(folder, case.contents())
    (folder / "canary").write_bytes(CANARY)
    before = _state(folder)
    rng = random.Random(f"{case}/work")
    try:
        with _bounded(SECONDS, MEMORY, "open and read"):
            outcome = asyncio.run(_read(case.geometry, path, rng))
        _unchanged(folder, before, "opening it read-only and reading")
        with _bounded(CHECK_SECONDS, CHECK_MEMORY, "check"):
            asyncio.run(_check(case.geometry, path))
        _unchanged(folder, before, "checking it")
        with _bounded(SECONDS, MEMORY, "open and write"):
            written = asyncio.run(_write(case.geometry, path, rng))
        own = {} if written == "refused" else dict.fromkeys(image.names)
        _unchanged(folder, {name: what for name, what in before.items() if name not in own}, f"writing ({written})")
    except FuzzFailure as failure:
        raise FuzzFailure(f"{case}: {failure}") from failure.__cause__
    except Exception as error:
        raise FuzzFailure(f"{case}: {type(error).__name__}: {error}") from error
    return f"{outcome}, {written}"


async def _open(geometry: Geometry, path: Path, *, read_only: bool) -> Node | None:
    """The node, or None when it is refused as it should be."""
    try:
        return await open_image(spec_of(geometry, path, read_only=read_only, unlock_seconds=SECONDS / 2))
    except ImageError as error:
        _judge_refusal(error, path)
        return None
    except ConfigError:
        if not geometry.secret:
            raise
        return None  # the damage took the encryption, and a secret for nothing is refused


def _judge_refusal(error: ImageError, path: Path) -> None:
    if error.field is None:
        raise FuzzFailure(f"the refusal names no field: {error}") from error
    if not error.path.startswith(str(path.parent)):
        raise FuzzFailure(f"the refusal names no file: {error}") from error


async def _read(geometry: Geometry, path: Path, rng: random.Random) -> str:
    node = await _open(geometry, path, read_only=True)
    if node is None:
        return "refused"
    outcome = "read"
    try:
        for offset in _places(node, rng):
            length = min(node.size - offset, rng.choice((512, 4 * KIB, 64 * KIB)))
            try:
                await node.read(offset, length)
                async for runs in node.top.iter_runs(offset, min(node.top.size, offset + MIB)):
                    assert len(runs)
            except (RequestError, OSError):
                outcome = "read in part"
    finally:
        await node.close()
    return outcome


async def _check(geometry: Geometry, path: Path) -> None:
    storage = await FileStorage.open(str(path), read_only=True)
    try:
        driver = await open_alone(storage, geometry.fmt)
    except ImageError as error:
        _judge_refusal(error, path)
        return
    try:
        if driver.can("check"):
            await driver.check()
    except (ImageError, RequestError, OSError):
        pass
    finally:
        await driver.close()


async def _write(geometry: Geometry, path: Path, rng: random.Random) -> str:
    node = await _open(geometry, path, read_only=False)
    if node is None:
        return "refused"
    outcome = "written"
    try:
        if node.read_only:
            return "read-only"
        for offset in _places(node, rng):
            length = min(node.size - offset, rng.choice((512, 4 * KIB, 64 * KIB)))
            try:
                if rng.random() < 0.7:
                    await node.write(offset, rng.randbytes(length))
                else:
                    await node.zero(offset, length)
                if rng.random() < 0.3:
                    await node.flush()
            except (RequestError, OSError, ImageError):
                outcome = "written in part"
    finally:
        try:
            await node.close()
        except (RequestError, OSError, ImageError):
            outcome = "not closed"
    return outcome


def _places(node: Node, rng: random.Random) -> list[int]:
    """Offsets at the ends, on both sides of cluster boundaries, and anywhere."""
    size = node.size
    if not size:
        return []
    cluster = max(512, node.top.cluster_size)
    places = [0, size - 1, max(0, size - 512), size // 2]
    for _ in range(4):
        boundary = rng.randrange(max(1, size // cluster)) * cluster
        places += [boundary, max(0, boundary - 512)]
    places += [rng.randrange(size) for _ in range(4)]
    return [place for place in places if place < size]


def _state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _unchanged(folder: Path, before: dict[str, bytes], doing: str) -> None:
    now = _state(folder)
    for name, content in before.items():
        if now.get(name) != content:
            raise FuzzFailure(f"{doing} changed {name}")
    still = [target for target in _open_files() if target.startswith(str(folder))]
    if still:
        raise FuzzFailure(f"{doing} left {still} open")


def _open_files() -> Iterator[str]:
    for entry in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue


# --- bounds ----------------------------------------------------------------------------------------------------------


@contextmanager
def _bounded(seconds: float, memory: int, doing: str) -> Iterator[None]:
    """FuzzFailure when the work takes more processor time or memory, or never ends."""

    def hangs(*_: Any) -> None:
        raise FuzzFailure(f"{doing}: no end after {HANG_SECONDS} s")

    _trim()
    start = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (proc(5))
    previous = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(HANG_SECONDS)
    begun = time.process_time()
    try:
        yield
    finally:
        used = time.process_time() - begun
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if used > seconds:
        raise FuzzFailure(f"{doing}: {used:.1f} s of processor time")
    peak = _status("VmHWM") - start
    if peak > memory:
        raise FuzzFailure(f"{doing}: {peak >> 20} MiB")


def _status(key: str) -> int:
    """A size from /proc/self/status, bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * KIB


def _trim() -> None:
    """Give freed memory back, so that using it again counts."""
    ctypes.CDLL(None).malloc_trim(0)


def limit_address_space() -> None:
    """For the process that runs cases."""
    limit = _status("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


# --- many images -----------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What came of a batch."""

    outcomes: Counter[str]
    failures: list[str]


def run_cases(cases: Sequence[Case], keep: Path | None = None) -> Report:
    """Try each; ``keep``: where the files of failing ones are left."""
    report = Report(Counter(), [])
    for case in cases:
        folder = Path(tempfile.mkdtemp(dir=images.SCRATCH))
        try:
            with remembered_keys():
                report.outcomes[run_case(case, folder)] += 1
        except FuzzFailure as failure:
            report.failures.append(str(failure))
            if keep is not None:
                where = keep / re.sub(r"\W+", "-", str(case))
                shutil.copytree(folder, where, dirs_exist_ok=True)
                for name, content in zip(build(case.geometry).names, case.contents(), strict=True):
                    (where / name).write_bytes(content)
        finally:
            shutil.rmtree(folder)
    return report


def geometries_of(fmt: str) -> tuple[Geometry, ...]:
    """Those whose images are damaged."""
    return KITS[fmt].geometries + KITS[fmt].readable


def mutations(fmt: str, count: int, seed: int, geometries: Sequence[Geometry] = ()) -> list[Case]:
    """``count`` mutations over the geometries of the format in turn."""
    chosen = geometries or geometries_of(fmt)
    return [Case(chosen[i % len(chosen)], seed + i // len(chosen)) for i in range(count)]


def swept(fmt: str, most: int | None, seed: int, geometries: Sequence[Geometry] = ()) -> list[Case]:
    """The boundary sweep over every geometry; ``most``: so many of its cases, chosen at random."""
    cases = [case for geometry in geometries or geometries_of(fmt) for case in sweep(geometry)]
    if most is None or most >= len(cases):
        return cases
    return random.Random(seed).sample(cases, most)


def _batches(cases: Sequence[Case]) -> Iterable[Sequence[Case]]:
    for first in range(0, len(cases), BATCH):
        yield cases[first : first + BATCH]


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 0 when every image was treated as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.property.fuzz_images", description=__doc__)
    parser.add_argument("--format", default="all", choices=("all", *KITS))
    parser.add_argument("--geometry", action="append", help="only this one (may be given again)")
    parser.add_argument("--images", type=int, default=int(os.environ.get("NBDSERVE_FUZZ_IMAGES", "10000")))
    parser.add_argument("--sweep", type=int, help="so many cases of the boundary sweep (default: all, 0: none)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="a directory for failing images")
    options = parser.parse_args(arguments)
    formats = list(KITS) if options.format == "all" else [options.format]
    known = [geometry.name for fmt in formats for geometry in geometries_of(fmt)]
    if unknown := set(options.geometry or ()).difference(known):
        parser.error(f"no such geometry: {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    failed = 0
    with ProcessPoolExecutor(options.jobs, initializer=limit_address_space) as pool:
        for fmt in formats:
            chosen = [g for g in geometries_of(fmt) if not options.geometry or g.name in options.geometry]
            if not chosen:
                continue
            cases = mutations(fmt, options.images, options.seed, chosen)
            cases += swept(fmt, options.sweep, options.seed, chosen)
            outcomes: Counter[str] = Counter()
            failures: list[str] = []
            started = time.monotonic()
            for future in as_completed([pool.submit(run_cases, batch, options.keep) for batch in _batches(cases)]):
                report = future.result()
                outcomes += report.outcomes
                failures += report.failures
                for failure in report.failures:
                    print(f"FAILED {failure}", flush=True)
            failed += len(failures)
            shown = "; ".join(f"{outcome}: {count}" for outcome, count in outcomes.most_common())
            print(
                f"{fmt}: {len(cases)} images over {len(chosen)} geometries in {time.monotonic() - started:.0f} s: "
                f"{len(failures)} failures ({shown})",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
