"""Bad input, with the real commands: a message that names what is wrong, exit code 1 (usage 2), nothing modified."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import pytest

from tests.interop.hostile import (
    CLUSTER,
    FOLLOWING,
    IO_ERROR,
    NBDSERVE,
    OPENING,
    QEMU_NBD,
    U32,
    U64,
    command,
    get_field,
    overlay,
    patch,
    qemu_io,
    refused,
    run,
    serving,
    set_field,
    shown,
    unchanged,
    url,
)
from tests.interop.tools import running_server, tool

# --- the header and the tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 3, 4, 71, 72, 103, 111, 600, CLUSTER, 3 * CLUSTER + 7])
def test_truncated(image: Path, length: int) -> None:
    """Declared as qcow2: a file that ends too early has no header, or no table where the header says."""
    os.truncate(image, length)
    for name in {"serve", OPENING[length % len(OPENING)]}:
        options = ["-f", "qcow2"] if name != "create" else []
        refused(image.parent, command(name, image, *options), image)


HOSTILE = [
    ("version", 0), ("version", 4), ("version", U32),
    ("backing_file_offset", 1), ("backing_file_offset", CLUSTER + 1), ("backing_file_offset", U64),
    ("backing_file_size", 1024), ("backing_file_size", U32),
    ("cluster_bits", 0), ("cluster_bits", 1), ("cluster_bits", 8), ("cluster_bits", 22), ("cluster_bits", U32),
    ("size", 1 << 63), ("size", U64),
    ("crypt_method", 3), ("crypt_method", 2), ("crypt_method", U32),
    ("l1_size", 0), ("l1_size", (4 << 20) + 1), ("l1_size", U32),
    ("l1_table_offset", 0), ("l1_table_offset", 1), ("l1_table_offset", 99 * CLUSTER), ("l1_table_offset", U64),
    ("refcount_table_offset", 0), ("refcount_table_offset", 1), ("refcount_table_offset", 99 * CLUSTER),
    ("refcount_table_offset", U64), ("refcount_table_clusters", 0), ("refcount_table_clusters", 129),
    ("refcount_table_clusters", U32),
    ("nb_snapshots", 65537), ("nb_snapshots", U32),
    ("snapshots_offset", 0), ("snapshots_offset", 1), ("snapshots_offset", 99 * CLUSTER), ("snapshots_offset", U64),
    ("incompatible_features", 1 << 5), ("incompatible_features", 1 << 63),
    ("refcount_order", 7), ("refcount_order", U32),
    ("header_length", 0), ("header_length", 1), ("header_length", 103), ("header_length", CLUSTER + 1),
    ("header_length", U32),
    ("compression_type", 1), ("compression_type", 255),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), HOSTILE)
def test_hostile_header_field(image: Path, field: str, value: int) -> None:
    set_field(image, field, value)
    turn = HOSTILE.index((field, value))
    name = OPENING[turn % len(OPENING)]
    refused(image.parent, command(name, image), image, f"{field} = {shown(value)}: ")


def test_every_unknown_feature_at_once(image: Path) -> None:
    set_field(image, "incompatible_features", U64)
    for name in OPENING:
        refused(image.parent, command(name, image), image, "incompatible_features = ", "bit 5, ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backing_file_offset", 0),
        ("backing_file_size", 0),
        ("size", 0),
        ("size", 1),
        ("crypt_method", 1),
        ("nb_snapshots", 0),
        ("refcount_order", 0),
        ("refcount_order", 6),
        ("incompatible_features", 1),
        ("incompatible_features", 2),
        ("incompatible_features", 16),
    ],
)
def test_odd_but_possible_header_field(image: Path, field: str, value: int) -> None:
    """Looking at the image works or is refused in order, and changes nothing."""
    set_field(image, field, value)
    for name, codes in (("info", {0}), ("check", {0, 1, 2, 3}), ("map", {0, 1})):
        with unchanged(image.parent):
            done = run(command(name, image))
        assert done.returncode in codes, done
        assert "Traceback" not in done.stderr, done


def test_a_missing_data_file_name(image: Path) -> None:
    set_field(image, "incompatible_features", 4)
    for name in FOLLOWING:
        refused(image.parent, command(name, image), image, "incompatible_features = 4", "data file")


def test_a_header_extension_that_is_too_long(image: Path) -> None:
    patch(image, 112 + 4, struct.pack(">I", U32))
    for name in OPENING:
        refused(image.parent, command(name, image), image, "header extension", hex(U32))


@pytest.mark.parametrize("entry", [CLUSTER * 99, CLUSTER + 512, 1 << 60, U64])
def test_l1_entry_that_leads_nowhere(image: Path, entry: int) -> None:
    """The image opens, since only a part of it is lost: requests there fail, and change nothing."""
    patch(image, get_field(image, "l1_table_offset"), struct.pack(">Q", entry))
    entry_is_shown(image, entry, "L1")


@pytest.mark.parametrize("entry", [CLUSTER * 99 | 1 << 63, CLUSTER * 3 + 512, 1 << 60 | CLUSTER * 5])
def test_l2_entry_that_leads_nowhere(image: Path, entry: int) -> None:
    (l1,) = struct.unpack_from(">Q", image.read_bytes(), get_field(image, "l1_table_offset"))
    patch(image, l1 & (1 << 56) - 512, struct.pack(">Q", entry))
    entry_is_shown(image, entry, "L2")


def entry_is_shown(image: Path, entry: int, table: str) -> None:
    refused(image.parent, command("map", image), image, f"invalid {table} entry {entry:#x}")
    with unchanged(image.parent):
        done = run(command("check", image))
    assert done.returncode in {1, 2}, done
    assert "Traceback" not in done.stderr, done
    before = image.read_bytes(), image.stat().st_mtime_ns
    with running_server(image.parent, image, "qcow2", ["-r"]):
        for _ in range(2):
            done = run(["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", url(image.parent)])
            assert IO_ERROR in done.stdout + done.stderr, done
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before
    assert "Traceback" not in (image.parent / "server.log").read_text()


@pytest.mark.parametrize("entry", [CLUSTER * 99, 512, U64])
def test_refcount_block_outside_the_file(image: Path, entry: int) -> None:
    """Reading needs no refcounts; whoever would write is refused, at once or when it comes to writing."""
    patch(image, get_field(image, "refcount_table_offset"), struct.pack(">Q", entry))
    with unchanged(image.parent):
        for name in ("info", "map"):
            assert run(command(name, image)).returncode == 0
        assert run(command("check", image)).returncode in {1, 2}
    data = image.read_bytes()
    process = subprocess.Popen(list(map(str, command("serve", image))), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline():
            assert IO_ERROR in qemu_io(url(image.parent), "write 768k 64k").stdout
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert b"Traceback" not in said
    # The corrupt bit is all that may be set; no cluster is written over.
    assert image.read_bytes()[512 : len(data)] == data[512:]


# --- chains ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["itself", "pair", "hard link", "symbolic link"])
def test_loop(tmp_path: Path, kind: str) -> None:
    top = overlay(tmp_path / "a", {"itself": "a", "pair": "b"}.get(kind, "link"), "qcow2")
    if kind == "pair":
        overlay(tmp_path / "b", "a", "qcow2")
    elif kind == "hard link":
        os.link(top, tmp_path / "link")
    elif kind == "symbolic link":
        (tmp_path / "link").symlink_to("a")
    for name in FOLLOWING:
        refused(tmp_path, command(name, top), tmp_path, "backing file = ", "the chain loops")
    refused(tmp_path, command("info", top, "--backing-chain"), tmp_path, "backing file = ", "the chain loops")


def test_a_chain_of_65(tmp_path: Path) -> None:
    overlay(tmp_path / "0", "none")
    plain = tmp_path / "0"
    tool("qemu-img", "create", "-q", "-f", "qcow2", plain, "1M")
    for number in range(1, 65):
        overlay(tmp_path / str(number), str(number - 1), "qcow2") if number == 1 else _relink(tmp_path, number)
    assert run(command("map", tmp_path / "63")).returncode == 0
    for name in FOLLOWING:
        refused(tmp_path, command(name, tmp_path / "64"), tmp_path / "64", "64 layers", "backing file = ")
    refused(tmp_path, command("info", tmp_path / "64", "--backing-chain"), tmp_path / "64", "64 layers")


def _relink(directory: Path, number: int) -> None:
    """Layer ``number`` as a copy of the first one with another name for what is below it."""
    target = directory / str(number)
    shutil.copy(directory / "1", target)
    name = str(number - 1).encode()
    patch(target, get_field(target, "backing_file_offset"), name)
    set_field(target, "backing_file_size", len(name))


def test_backing_file_outside_the_roots(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "base.raw").write_bytes(b"i" * (1 << 20))
    (tmp_path / "secret").write_bytes(b"s" * (1 << 20))
    top = tmp_path / "images" / "top"
    (tmp_path / "images" / "link").symlink_to(tmp_path / "secret")
    for name in ("../secret", str(tmp_path / "secret"), "link", "/etc/shadow", "/dev/null"):
        overlay(top, name)
        for each in FOLLOWING:
            refused(tmp_path, command(each, top), top, f"backing file = {name!r}: ")
    for name, letter in (("../secret", "0x73"), ("base.raw", "0x69")):
        overlay(top, name)
        root = ["--image-root", str(tmp_path)] if letter == "0x73" else ["--image-root", "/usr"]
        assert run(command("map", top, *root)).returncode == 0
        assert run(command("info", top, "--backing-chain", *root)).returncode == 0
        with running_server(top.parent, top, "qcow2", root):
            assert qemu_io(url(top.parent), f"read -P {letter} 0 1M").returncode == 0
    refused(tmp_path, [NBDSERVE, "serve", "--image-root", tmp_path / "none", top], tmp_path / "none", "image root")


@pytest.mark.parametrize(
    "name",
    ['json:{"driver":"file","filename":"base.raw"}', "nbd://127.0.0.1:10809/x", "http://localhost/x", "fat:rw:/tmp"],
)
def test_names_that_are_no_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(512))
    top = overlay(tmp_path / "top", name)
    for each in FOLLOWING:
        refused(tmp_path, command(each, top), top, f"backing file = {name!r}", "never followed")
    refused(tmp_path, command("info", top, "--backing-chain"), top, "never followed")


def test_backing_file_without_a_format(image: Path) -> None:
    top = overlay(image.parent / "top", "disk.qcow2", None)
    for each in FOLLOWING:
        refused(image.parent, command(each, top), top, "backing file = 'disk.qcow2'", "no format")


@pytest.mark.parametrize("below", ["missing", "directory", "fifo", "truncated", "vmdk"])
def test_bad_backing_file(tmp_path: Path, below: str) -> None:
    path = tmp_path / "below"
    if below == "directory":
        path.mkdir()
    elif below == "fifo":
        os.mkfifo(path)
    elif below == "truncated":
        path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(20))
    top = overlay(tmp_path / "top", "below", "qcow2" if below == "truncated" else "raw")
    if below == "vmdk":
        path.write_bytes(b"KDMV" + bytes(508))
        overlay(top, "below", "raw")
        patch(top, top.read_bytes().index(b"raw\0"), b"qed")
    for each in FOLLOWING:
        refused(tmp_path, command(each, top), path if below in {"truncated", "vmdk"} else "'below'")


def test_data_file_outside_the_roots(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    top = tmp_path / "images" / "top"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", top, "1M")
    for each in FOLLOWING:
        refused(tmp_path, command(each, top), top, f"data file = '{tmp_path}/data'", "outside the image roots")


# --- a guest that writes a header --------------------------------------------------------------------------------


def test_probed_raw_stays_raw(tmp_path: Path) -> None:
    raw, evil = tmp_path / "raw", tmp_path / "evil"
    raw.write_bytes(bytes(1 << 20))
    (tmp_path / "secret").write_bytes(b"s" * 512)
    overlay(evil, str(tmp_path / "secret"), size="8M")
    os.truncate(evil, 1 << 16)
    for argv in ([NBDSERVE, "serve"], [QEMU_NBD, "-t"]):
        with serving(tmp_path, [*argv, "-k", tmp_path / "nbd.sock", raw]):
            done = qemu_io(url(tmp_path), f"write -s {evil} 0 64k", f"write -s {evil} 0 512")
            assert done.stdout.count("Operation not permitted") == 2, done
            assert qemu_io(url(tmp_path), "write -P 7 512 512", "write -P 0 0 512", "write -z 0 64k").returncode == 0
        assert raw.read_bytes() == bytes(1 << 20)
    for _ in range(2):
        with running_server(tmp_path, raw, "raw"):
            assert f"{1 << 20}" in tool("nbdinfo", "--size", url(tmp_path))
            assert qemu_io(url(tmp_path), f"write -s {evil} 0 64k").returncode == 0
    assert raw.read_bytes()[: 1 << 16] == evil.read_bytes()
    assert json.loads(tool(NBDSERVE, "image", "info", "-f", "raw", "--output=json", raw))["virtual-size"] == 1 << 20
