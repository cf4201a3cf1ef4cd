"""What the first and last bytes say, and that qemu-img says the same wherever it knows the format."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest

from nbdserve.formats.probe import format_of, probe
from nbdserve.storage.file import FileStorage
from nbdserve.storage.memory import MemoryStorage
from tests.support.images import create, needs_qemu, run

BOCHS = b"Bochs Virtual HD Image".ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + b"Growing".ljust(16, b"\0")
CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"
VDI = b"\x7f\x10\xda\xbe"

HEADS: list[tuple[bytes, str]] = [
    (b"", "raw"),
    (b"QFI", "raw"),
    (b"QFI\xfb\0\0\0\1", "qcow"),
    (b"QFI\xfb\0\0\0\2", "qcow2"),
    (b"QFI\xfb\0\0\0\3", "qcow2"),
    (b"QFI\xfb\xff\0\0\0", "qcow2"),
    (b"QED\0", "qed"),
    (b"QED", "qed"),
    (b"QED1", "raw"),
    (b"KDMV\1", "vmdk"),
    (b"COWD", "vmdk"),
    (b"conectix", "vpc"),
    (b"conecti", "raw"),
    (b"vhdxfile", "vhdx"),
    (b"LUKS\xba\xbe\0\1", "luks"),
    (b"LUKS\xba\xbe\0\2", "raw"),
    (b"WithoutFreeSpace", "raw"),
    (b"WithoutFreeSpace\2\0\0\0", "parallels"),
    (b"WithouFreSpacExt\2\0\0\0", "parallels"),
    (b"WithouFreSpacExt\3\0\0\0", "raw"),
    (BOCHS + b"\0\0\2\0", "bochs"),
    (BOCHS + b"\0\0\1\0", "bochs"),
    (BOCHS + b"\0\0\3\0", "raw"),
    (BOCHS.replace(b"Redolog\0\0", b"Redolog\0x") + b"\0\0\2\0", "bochs"),
    (BOCHS.replace(b"Redolog\0", b"Redologx") + b"\0\0\2\0", "raw"),
    (BOCHS.replace(b"Growing", b"Sparse\0") + b"\0\0\2\0", "raw"),
    (CLOOP, "cloop"),
    (CLOOP[:-1], "raw"),
    (bytes(64) + VDI, "vdi"),
    (bytes(60) + VDI, "raw"),
    (bytes(512) + b"QFI\xfb\0\0\0\3", "raw"),
    (b"# Disk DescriptorFile\nversion=1\n", "vmdk"),
    (b"version=2\n", "vmdk"),
    (b"# x\r\nversion=3\r\n", "vmdk"),
    (b"# x\n   \nversion=1\n", "vmdk"),
    (b"# x\n  \r\nversion=1\n", "vmdk"),
    (b"# x\n   version=1\n", "raw"),
    (b"# x\n\nversion=1\n", "raw"),
    (b"# x\n\t\nversion=1\n", "raw"),
    (b"version=1", "raw"),
    (b"version=4\n", "raw"),
    (b"version=1x\n", "raw"),
    (b"version = 1\n", "raw"),
    (b"# Disk DescriptorFile\n", "raw"),
    (b"# Disk DescriptorFile\nCID=1\nversion=1\n", "raw"),
    (b"#" + b"x" * 500 + b"\nversion=1\n", "vmdk"),
    (b"#" + b"x" * 501 + b"\nversion=1\n", "raw"),
    # Two at once.
    (b"QED\0".ljust(64, b"\0") + VDI, "qed"),
    (b"WithoutFreeSpace\2\0\0\0".ljust(64, b"\0") + VDI, "parallels"),
    *(
        (magic.ljust(64, b"\0") + VDI, "vdi")
        for magic in (b"QFI\xfb\0\0\0\1", b"QFI\xfb\0\0\0\3", b"KDMV", b"conectix", b"vhdxfile", b"LUKS\xba\xbe\0\1")
    ),
    (b"version=1\n".ljust(64, b"\0") + VDI, "vdi"),
]


@pytest.mark.parametrize(("head", "name"), HEADS)
def test_the_head_decides(head: bytes, name: str) -> None:
    assert format_of(head) == name
    assert format_of(memoryview(head)) == name


def test_a_damaged_version_does_not_make_a_qcow2_image_raw() -> None:
    """qemu-img serves it, and writes to it, as raw."""
    assert format_of(b"QFI\xfb\0\0\0\0") == "qcow2"


@pytest.mark.parametrize(("name", "found"), [("d.dmg", "dmg"), ("a/.dmg", "dmg"), (".dmg", "raw"), ("d.DMG", "raw")])
def test_the_name_counts_where_nothing_else_speaks(name: str, found: str) -> None:
    assert format_of(b"", name=name) == found
    assert format_of(b"QED\0", name=name) == "qed"


def _footer(disk_type: int = 2, length: int = 512, size: int = 1 << 20) -> bytes:
    """A VHD footer (Virtual Hard Disk Image Format Specification 1.0, "Hard Disk Footer Format")."""
    makers = (b"win ", 0x50003, b"Wi2k")
    head = struct.pack(">8sIIQI4sI4sQQ", b"conectix", 2, 0x10000, (1 << 64) - 1, 0, *makers, size, size)
    footer = bytearray(head.ljust(length, b"\0"))
    struct.pack_into(">HBBI", footer, 56, 30, 4, 17, disk_type)
    struct.pack_into(">I", footer, 64, ~sum(footer) & 0xFFFFFFFF)
    return bytes(footer)


def test_a_fixed_vhd_is_told_by_its_footer() -> None:
    assert format_of(bytes(512), _footer()) == "vpc"
    assert format_of(bytes(512), b"x" + _footer(length=511)) == "vpc"
    assert format_of(b"\xeb\x3c\x90", _footer()) == "vpc", "what the guest has in its boot sector does not matter"
    assert format_of(b"QFI\xfb\0\0\0\3", _footer()) == "qcow2"


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"conectix",
        _footer()[:-1] + b"\1",
        _footer(disk_type=3),
        _footer(disk_type=4),
        b"\0\0" + _footer()[:-2],
        _footer()[1:] + b"\0",
    ],
)
def test_what_is_no_whole_footer_of_a_fixed_disk_does_not_count(tail: bytes) -> None:
    assert format_of(bytes(512), tail) == "raw"


async def test_a_storage_is_probed_by_its_ends() -> None:
    storage = MemoryStorage(size=8)
    assert await probe(storage) == "raw"
    await storage.write(0, b"QFI\xfb\0\0\0\3")
    assert await probe(storage) == "qcow2"
    for footer in (_footer(), _footer(length=511)):
        assert await probe(MemoryStorage(b"\x55\xaa" * 1000 + footer)) == "vpc"
        assert await probe(MemoryStorage(b"\x55\xaa" * 1000 + footer + b"\0\0")) == "raw"
    assert await probe(MemoryStorage(path="x.dmg", size=100)) == "dmg"
    assert await probe(MemoryStorage()) == "raw"


def _qemu_says(path: Path) -> str:
    """The format qemu-img finds; empty where it names none, because it cannot open what it found."""
    done = subprocess.run(["qemu-img", "info", "--output=json", path], capture_output=True, text=True, check=False)
    return json.loads(done.stdout)["format"] if done.returncode == 0 else ""


@needs_qemu
async def test_qemu_img_agrees_on_every_head(tmp_path: Path) -> None:
    """It opens what it found, which fails for a mere magic: then it has found something that is not raw."""
    path = tmp_path / "disk"
    for head, name in HEADS:
        path.write_bytes(head.ljust(4096, b"\0"))
        assert (_qemu_says(path) == "raw") == (name == "raw"), head
        storage = await FileStorage.open(str(path), read_only=True)
        assert await probe(storage) == name
        await storage.close()


@needs_qemu
@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("raw", ""),
        ("qcow", ""),
        ("qcow2", ""),
        ("qcow2", "compat=0.10"),
        ("qed", ""),
        ("vdi", ""),
        ("vdi", "static=on"),
        ("vpc", "subformat=dynamic"),
        ("vpc", "subformat=fixed"),
        ("vhdx", ""),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
        ("vmdk", "subformat=twoGbMaxExtentFlat"),
        ("vmdk", "subformat=streamOptimized"),
        ("parallels", ""),
        ("luks", "key-secret=s,iter-time=10"),
    ],
)
async def test_images_qemu_img_makes(tmp_path: Path, fmt: str, options: str) -> None:
    path = tmp_path / "disk"
    if fmt == "luks":
        run("qemu-img", "create", "-q", "--object", "secret,id=s,data=x", "-f", fmt, "-o", options, path, "8M")
    else:
        create(path, 8 << 20, fmt=fmt, options=options)
    storage = await FileStorage.open(str(path), read_only=True)
    assert await probe(storage) == fmt
    await storage.close()
    assert _qemu_says(path) == ("raw" if options == "subformat=fixed" else fmt)
