"""Apple disk images as hdiutil lays them out: no stock tool here writes them."""

from __future__ import annotations

import base64
import bz2
import itertools
import random
import struct
import zlib
from dataclasses import dataclass, field

from nbdserve.formats.dmg import layout
from nbdserve.units import SECTOR_SIZE


def adc(data: bytes) -> bytes:
    """ADC data that makes ``data``: every run of one byte as a copy, the rest as literals."""
    out = bytearray()
    at = 0
    while at < len(data):
        run = 1
        while run < 68 and at + run < len(data) and data[at + run] == data[at]:
            run += 1
        if run >= 5:
            out += bytes((0x80, data[at]))
            rest = run - 1
            out += bytes((rest - 3 << 2, 0)) if rest <= 18 else bytes((0x40 | rest - 4, 0, 0))
            at += run
            continue
        end = at + 1
        while end < len(data) and end - at < 128 and data[end : end + 5] != data[end : end + 1] * 5:
            end += 1
        out += bytes((0x80 | end - at - 1,)) + data[at:end]
        at = end
    return bytes(out)


def lzfse(data: bytes) -> bytes:
    """By the optional package."""
    import lzfse as package  # noqa: PLC0415

    return bytes(package.compress(data))


ENCODERS = {
    layout.RAW: bytes,
    layout.ZLIB: zlib.compress,
    layout.BZIP2: bz2.compress,
    layout.ADC: adc,
    layout.LZFSE: lzfse,
}


@dataclass
class Chunk:
    """One row of a table. Sectors; ``data`` as it is stored."""

    kind: int
    sector: int
    count: int
    data: bytes = b""
    offset: int | None = None
    """Where the data are, if not where they are put."""
    length: int | None = None


@dataclass
class Image:
    """Everything that is in the file; a test may change any of it."""

    sectors: int
    tables: list[list[Chunk]] = field(default_factory=list)
    first_sectors: list[int] = field(default_factory=list)
    data_fork_offset: int = 0
    resource_fork: bool = False
    padding: bytes = b""
    extra_data: tuple[bytes, ...] = (b"csum", b"not a table of chunks")
    trailer: dict[str, int] = field(default_factory=dict)

    def build(self) -> bytes:
        """The file."""
        body = bytearray(self.data_fork_offset)
        tables = [
            self._table(chunks, first, body) for chunks, first in zip(self.tables, self.first_sectors, strict=True)
        ]
        at = len(body)
        if self.resource_fork:
            body += resource_fork([*self.extra_data, *tables])
        else:
            body += property_list([*self.extra_data, *tables])
        names = ("rsrc_fork_offset", "rsrc_fork_length") if self.resource_fork else ("xml_offset", "xml_length")
        fields: dict[str, object] = dict.fromkeys((sub.name for sub in layout.KOLY.subcons), 0)
        fields |= {
            "magic": b"koly",
            "version": 4,
            "header_size": 512,
            "flags": 1,
            "data_fork_offset": self.data_fork_offset,
            "data_fork_length": at - self.data_fork_offset,
            "segment_number": 1,
            "segment_count": 1,
            "segment_id": bytes(16),
            "data_checksum": bytes(136),
            "master_checksum": bytes(136),
            "reserved_1": bytes(120),
            "reserved_2": bytes(12),
            "image_variant": 1,
            "sector_count": self.sectors,
            names[0]: at,
            names[1]: len(body) - at,
        }
        return bytes(body + layout.KOLY.build(fields | self.trailer)) + self.padding

    def _table(self, chunks: list[Chunk], first: int, body: bytearray) -> bytes:
        rows = b""
        base = len(body) - self.data_fork_offset
        for chunk in chunks:
            offset = len(body) - self.data_fork_offset - base if chunk.offset is None else chunk.offset
            length = len(chunk.data) if chunk.length is None else chunk.length
            rows += struct.pack(">IIQQQQ", chunk.kind, 0, chunk.sector, chunk.count, offset, length)
            body += chunk.data
        total = sum(chunk.count for chunk in chunks)
        rows += struct.pack(">IIQQQQ", layout.END, 0, total, 0, len(body) - self.data_fork_offset - base, 0)
        count = len(rows) // 40
        head = struct.pack(">4sIQQQII24s136sI", b"mish", 1, first, total, base, 0, 0, b"", b"", count)
        return head + rows


def property_list(tables: list[bytes]) -> bytes:
    """As hdiutil writes it, the base64 text broken into lines."""
    out = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<plist version="1.0">\n<dict>\n\t<key>resource-fork</key>\n\t<dict>\n'
    )
    out += "\t\t<key>blkx</key>\n\t\t<array>\n"
    for number, table in enumerate(tables):
        text = base64.b64encode(table).decode()
        lines = "\n\t\t\t\t".join(text[at : at + 60] for at in range(0, len(text), 60))
        out += f"\t\t\t<dict><key>ID</key><string>{number}</string>\n\t\t\t\t<key>Data</key>\n"
        out += f"\t\t\t\t<data>\n\t\t\t\t{lines}\n\t\t\t\t</data>\n\t\t\t</dict>\n"
    return (out + "\t\t</array>\n\t</dict>\n</dict>\n</plist>\n").encode()


def resource_fork(resources: list[bytes]) -> bytes:
    """A header of 256 bytes, the resources, and a map nobody here reads."""
    data = b"".join(struct.pack(">I", len(one)) + one for one in resources)
    return struct.pack(">IIII", 256, 256 + len(data), len(data), 50).ljust(256, b"\0") + data + bytes(50)


def content(size: int, seed: int = 1) -> bytes:
    """Text, noise and zeroes."""
    rng = random.Random(seed)
    pieces = [rng.choice((bytes(3000), b"an apple a day " * 200, rng.randbytes(3000))) for _ in range(size // 3000 + 1)]
    return b"".join(pieces)[:size]


def image_of(data: bytes, kinds: list[int], *, chunk_sectors: int = 512, tables: int = 3, seed: int = 1) -> Image:
    """An image of ``data``, its chunks of random lengths and of these kinds in turn; sectors of ZERO_FILL and IGNORED
    are not those of ``data`` but zeroes."""
    rng = random.Random(seed)
    sectors = len(data) // SECTOR_SIZE
    image = Image(sectors)
    limits = [0, *sorted(rng.sample(range(1, sectors), tables - 1)), sectors]
    turn = 0
    for first, end in itertools.pairwise(limits):
        chunks = []
        at = first
        while at < end:
            count = min(end - at, rng.randrange(1, chunk_sectors + 1))
            kind = kinds[turn % len(kinds)]
            turn += 1
            part = data[at * SECTOR_SIZE : (at + count) * SECTOR_SIZE]
            stored = ENCODERS[kind](part) if kind in ENCODERS else b""
            chunks.append(Chunk(kind, at - first, count, stored))
            if turn % 5 == 0:
                chunks.append(Chunk(layout.COMMENT, at - first, 0))
            at += count
        image.tables.append(chunks)
        image.first_sectors.append(first)
    return image


def guest(image: Image, data: bytes) -> bytes:
    """What the guest reads of ``image_of(data, ...)``."""
    found = bytearray(data)
    for chunks, first in zip(image.tables, image.first_sectors, strict=True):
        for chunk in chunks:
            if chunk.kind in (layout.ZERO_FILL, layout.IGNORED):
                start, length = (first + chunk.sector) * SECTOR_SIZE, chunk.count * SECTOR_SIZE
                found[start : start + length] = bytes(length)
    return bytes(found)
