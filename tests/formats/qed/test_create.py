"""New QED images are those of qemu-img, byte for byte, and no bad option makes a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.qed.create import create_qed, parse_options, plan_header
from nbdserve.formats.qed.driver import QedDriver
from nbdserve.units import GIB, MIB
from tests.support import images
from tests.support.recording import ByteStorage, Recorder


@images.needs_qemu
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (10 * MIB, {}),
        (0, {}),
        (513, {"cluster_size": "4k", "table_size": "2"}),
        (64 * GIB, {"cluster_size": "64k", "table_size": "16"}),
        (3 * MIB, {"cluster_size": "1M", "table_size": "16"}),
        (1 * GIB, {"backing_file": "base file", "backing_fmt": "raw"}),
        (1 * GIB, {"backing_file": "base,file", "backing_fmt": "qcow2"}),
    ],
)
async def test_qemu_img_makes_the_same(tmp_path: Path, size: int, options: dict[str, str]) -> None:
    storage = ByteStorage()
    await create_qed(storage, size, options)
    path = tmp_path / "x.qed"
    plain = {name: value for name, value in options.items() if not name.startswith("backing")}
    command = ["qemu-img", "create", "-q", "-u", "-f", "qed"]
    if plain:
        command += ["-o", ",".join(f"{name}={value}" for name, value in plain.items())]
    if "backing_file" in options:
        command += ["-b", options["backing_file"], "-F", options["backing_fmt"]]
    images.run(*command, path, str(size))
    assert path.read_bytes() == storage.content


async def test_sizes_that_qemu_cannot_count() -> None:
    """QEMU's figure of the largest disk overflows for these, and it takes tables of one cluster for bad."""
    for cluster, table in (("64M", "1"), ("64M", "16"), ("8M", "2"), ("4k", "1")):
        options = {"cluster_size": cluster, "table_size": table}
        header = plan_header(GIB, parse_options(options))
        end = header.l1_table_offset + header.table_bytes
        assert type(header).parse(header.build(), "x", end) == header


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        (MIB, {"cluster_size": "2k"}, "cluster_size=2048"),
        (MIB, {"cluster_size": "128M"}, "cluster_size"),
        (MIB, {"cluster_size": "5000"}, "power of two"),
        (MIB, {"cluster_size": "big"}, "cluster_size"),
        (MIB, {"table_size": "3"}, "table_size=3"),
        (MIB, {"table_size": "32"}, "table_size=32"),
        (MIB, {"preallocation": "metadata"}, "preallocation=metadata"),
        (MIB, {"backing_fmt": "raw"}, "needs backing_file"),
        (MIB, {"backing_file": "b"}, "never guessed"),
        (MIB, {"backing_file": "b" * 1024, "backing_fmt": "raw"}, "does not fit"),
        (2 * GIB, {"cluster_size": "4k", "table_size": "1"}, "larger than the 1073741824"),
        (MIB, {"compat": "1.1"}, "unknown qed option 'compat'"),
    ],
)
def test_what_cannot_be_is_refused(size: int, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QedDriver.validate_create(size, options)


async def test_a_crash_while_it_is_made_leaves_no_image() -> None:
    recorder = Recorder(1)
    storage = recorder.storage(b"QED\0" + bytes(100000))
    await create_qed(storage, MIB, {"preallocation": "full"})
    header = next(i for i, entry in enumerate(recorder.log) if getattr(entry, "data", b"")[:4] == b"QED\0")
    barriers = [i for i, entry in enumerate(recorder.log) if hasattr(entry, "site")]
    assert any(i < header for i in barriers)
    assert any(i > header for i in barriers)


def test_the_size_an_image_gets() -> None:
    assert QedDriver.created_size(513, {}) == 1024
