import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.cli.image.create import parse_option_list
from nbdserve.formats.registry import DRIVERS
from nbdserve.storage.file import FileStorage
from tests.cli.image.helpers import Ran, image, interrupted, qemu_img
from tests.formats.parts import PartsDriver
from tests.support.images import needs_qemu


@needs_qemu
@pytest.mark.parametrize(
    "arguments",
    [
        ["-f", "qcow2", "i", "10M"],
        ["-f", "qcow2", "-o", "size=10M,cluster_size=4k", "-o", "lazy_refcounts", "i"],
        ["-f", "qcow2", "-b", "base.raw", "-F", "raw", "i"],
        ["-f", "qcow2", "-b", "base.raw", "-F", "raw", "i", "7M"],
        ["-f", "qcow2", "-o", "backing_file=base.raw,backing_fmt=raw", "i"],
        ["-f", "qcow2", "-u", "-b", "nosuch", "-F", "qcow2", "i", "7M"],
        ["-f", "qcow2", "i", "0"],
        ["-f", "qcow2", "-o", "nocow=on", "i", "1000"],
        ["-f", "qcow2", "-o", "data_file=d.raw,data_file_raw=on", "i", "1M"],
        ["i", "1000"],
        ["-o", "preallocation=full", "i", "1M"],
    ],
)
def test_the_image_is_the_one_qemu_img_makes(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(bytes(5 << 20))
    facts = []
    for run in (lambda: image(monkeypatch, "create", *arguments), lambda: qemu_img("create", *arguments)):
        ran = run()
        assert ran.code == 0, ran.err
        assert ran.out.startswith("Formatting 'i', fmt=")
        described = qemu_img("info", "-f", "qcow2" if "qcow2" in arguments else "raw", "--output", "json", "i").json()
        del described["actual-size"]
        facts.append(described)
        if "nosuch" not in arguments and "qcow2" in arguments:
            assert qemu_img("check", "i").code == 0
        Path("i").unlink()
    assert facts[0] == facts[1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-f", "qcow2", "i"], "needs a size"),
        (["-f", "qcow2", "i", "1Q"], "1Q"),
        (["-f", "qcow2", "-o", "size=1M", "i", "1M"], "only once"),
        (["-f", "qcow2", "-o", "cluster_size=3000", "i", "1M"], "cluster_size=3000"),
        (["-f", "qcow2", "-o", "nope=1", "i", "1M"], "'nope'"),
        (["-f", "qcow2", "-b", "base.raw", "i"], "without backing format"),
        (["-f", "qcow2", "-F", "raw", "i", "1M"], "without backing file"),
        (["-f", "vhdx", "-u", "-b", "base.vhdx", "-F", "vhdx", "i", "1M"], "identity of its backing file"),
        (["-f", "qcow2", "-b", "nosuch", "-F", "raw", "i", "1M"], "nosuch"),
        (["-f", "qcow2", "-b", "base.raw", "-F", "qcow2", "i", "1M"], "base.raw"),
        (["-f", "qcow2", "-b", "base.raw", "-F", "foo", "i"], "foo"),
        (["-f", "qcow2", "-u", "-b", "nosuch", "-F", "raw", "i"], "needs a size"),
        (["-f", "qcow2", "-o", "cluster_size=512", "i", "129G"], "larger cluster_size"),
        (["-b", "base.raw", "-F", "raw", "i", "1M"], "no backing file"),
        (["-o", "preallocation=metadata", "i", "1M"], "preallocation=metadata"),
        (["-f", "vhs", "i", "1M"], "vhs"),
        (["-f", "bochs", "i", "1M"], "Format driver 'bochs' does not support image creation"),
        (["-f", "qcow2", "-o", "data_file=i", "i", "1M"], "same file"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_what_cannot_be_made_leaves_things_as_they_were(
    arguments: list[str], problem: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(bytes(1 << 20))
    if existing:
        Path("i").write_bytes(b"precious")
    ours = image(monkeypatch, "create", *arguments)
    assert (ours.code, ours.out) == (1, "")
    assert problem in ours.err
    assert Path("i").read_bytes() == b"precious" if existing else not Path("i").exists()


def test_an_image_is_not_its_own_backing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert image(monkeypatch, "create", "-q", "-f", "qcow2", "i", "1M").code == 0
    ours = image(monkeypatch, "create", "-f", "qcow2", "-b", "i", "-F", "qcow2", "i")
    assert ours.code == 1
    assert "same file" in ours.err
    assert image(monkeypatch, "check", "i").code == 0


async def test_a_file_in_use_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "i"
    path.write_bytes(b"precious")
    user = await FileStorage.open(str(path))
    try:
        ours = await asyncio.to_thread(image, monkeypatch, "create", "-f", "qcow2", path, "1M")
    finally:
        await user.close()
    assert ours.code == 1
    assert str(path) in ours.err
    assert path.read_bytes() == b"precious"


def test_a_creation_that_fails_half_way_removes_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileStorage, "flush", full)
    ours = image(monkeypatch, "create", "-f", "qcow2", "-o", "data_file=d", tmp_path / "i", "1M")
    assert ours.code == 1
    assert "No space left" in ours.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_interrupted(form: str, tmp_path: Path) -> None:
    arguments = ["-q", "-f", form, "-o", "preallocation=full", tmp_path / "i", "8M"]
    assert interrupted("create", *arguments, mark="bytes(1 << 20)") == Ran(130, "", "")
    assert os.listdir(tmp_path) == []


def test_help_lists_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = image(monkeypatch, "create", "-f", "qcow2", "-o", "help")
    assert ours.code == 0
    assert "cluster_size=" in ours.out


def test_option_lists() -> None:
    assert parse_option_list(["a=1,b", "c=x,,y"]) == {"a": "1", "b": "on", "c": "x,y"}
    assert parse_option_list(["a=1,a=2"]) == {"a": "2"}
    assert parse_option_list(["a=1", "?"]) is None


@pytest.fixture
def _parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(DRIVERS, "parts", PartsDriver)
    yield
    PartsDriver.opened.clear()


@pytest.mark.usefixtures("_parts")
def test_all_files_of_an_image_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert image(monkeypatch, "create", "-f", "parts", "-o", "count=2", "i", "1M").code == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "i": b"part0\npart1",
        "part0": bytes(1 << 20),
        "part1": bytes(1 << 20),
    }


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-f", "parts", "part0", "1M"], "same file"),
        (["-f", "parts", "-b", "part0", "-F", "raw", "i", "1M"], "same file"),
        (["-f", "parts", "i", "1536"], "multiple of 1024"),
        (["-f", "parts", "-o", "nope=1", "i", "1M"], "unknown parts option 'nope'"),
    ],
)
def test_every_file_of_an_image_is_checked_before_one_is_touched(
    arguments: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("part0").write_bytes(b"precious")
    ours = image(monkeypatch, "create", *arguments)
    assert (ours.code, ours.out) == (1, "")
    assert problem in ours.err
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("part0", b"precious")]


@pytest.mark.usefixtures("_parts")
def test_the_driver_sees_the_open_backing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.raw").write_bytes(bytes(2048))
    assert image(monkeypatch, "create", "-f", "parts", "-b", "base.raw", "-F", "raw", "i").code == 0
    assert Path("i").read_bytes() == b"part0\n=base.raw"
    assert Path("part0").read_bytes() == bytes(2048)


def test_a_raw_file_keeps_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vm.img").write_bytes(b"precious" * (1 << 17))
    os.utime("vm.img", (1, 1))
    Path("base").write_bytes(bytes(1 << 20))
    ran = image(
        monkeypatch, "create", "-f", "raw-cow", "-o", "backing_file=base,backing_fmt=raw,raw_file=vm.img", "vm.raw-cow"
    )
    assert ran.code == 0, ran.err
    assert Path("vm.img").read_bytes() == b"precious" * (1 << 17)
    assert Path("vm.img").stat().st_mtime == 1
    ran = image(monkeypatch, "create", "-f", "raw-cow", "-o", "raw_file=new.img", "new.raw-cow", "3M")
    assert ran.code == 0, ran.err
    assert Path("new.img").stat().st_size == 3 << 20


@pytest.mark.parametrize("length", [0, 8000, 3 << 20])
def test_a_raw_file_of_another_size_is_refused(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("passwd").write_bytes(b"p" * length)
    Path("old").write_bytes(b"an image")
    ran = image(monkeypatch, "create", "-f", "raw-cow", "-o", "raw_file=passwd", "old", "1M")
    assert ran.code == 1
    assert f"passwd: it is there and has {length} bytes, the disk has 1048576" in ran.err
    assert Path("passwd").read_bytes() == b"p" * length
    assert Path("old").read_bytes() == b"an image"
    assert image(monkeypatch, "create", "-f", "raw-cow", "-o", "raw_file=passwd", "new", "1M").code == 1
    assert not Path("new").exists()


@pytest.mark.parametrize("name", ["base", "link", "vm.raw-cow", "./vm.raw-cow"])
def test_a_raw_file_is_none_of_the_other_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").write_bytes(b"base" * 1000)
    Path("link").hardlink_to("base")
    options = f"backing_file=base,backing_fmt=raw,raw_file={name}"
    ran = image(monkeypatch, "create", "-f", "raw-cow", "-o", options, "vm.raw-cow")
    assert ran.code == 1
    assert "are the same file" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "link"]
    assert Path("base").read_bytes() == b"base" * 1000


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "encrypt.key-secret=s", "--object", "secret,id=s,file=key"],
        ["-o", "encrypt.key-secret=t", "--object", "secret,id=s,file=i", "--object", "secret,id=t,env=KEY"],
        ["--secret-file", "key"],
        ["--secret-env", "KEY"],
    ],
)
def test_a_secret_reaches_the_driver_and_is_not_shown(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEY", "hush")
    Path("key").write_bytes(b"hush")
    Path("i").write_bytes(b"old")
    ours = image(monkeypatch, "create", "-f", "parts", *arguments, "i", "1M")
    assert ours.code == 0, ours.err
    assert "hush" not in ours.out + ours.err
    assert Path("i").read_bytes() == b"part0\nsecret b'hush'"


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["-o", "encrypt.key-secret=s"], "no secret of the id 's'"),
        (["-o", "encrypt.key-secret=s", "--object", "secret,id=s,data=hush"], "every user"),
        (["-o", "encrypt.key-secret=s", "--object", "secret,id=s,env=KEY", "--secret-env", "KEY"], "exclude"),
        (["--secret-file", "absent"], "absent"),
        (["-f", "raw", "--secret-env", "KEY"], "never encrypted"),
        (["--secret-file", "a", "--secret-env", "KEY"], "both"),
    ],
)
def test_a_secret_that_is_not_there(
    arguments: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEY", "hush")
    ours = image(monkeypatch, "create", "-f", "parts", *arguments, "i", "1M")
    assert ours.code in {1, 2}
    assert problem in ours.err
    assert "hush" not in ours.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["-f", "luks"], ["-f", "qcow2", "-o", "encrypt.format=luks"]])
def test_without_its_secret_an_encrypted_image_replaces_nothing(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("i").write_bytes(b"old")
    ours = image(monkeypatch, "create", *options, "i", "1M")
    assert ours.code == 1
    assert "needs a secret" in ours.err
    assert Path("i").read_bytes() == b"old"


@pytest.mark.parametrize("fmt", ["vmdk", "vpc", "vdi", "vhdx"])
def test_without_its_parent_a_differencing_image_replaces_nothing(
    fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("i").write_bytes(b"old")
    ours = image(monkeypatch, "create", "-u", "-f", fmt, "-b", "absent", "-F", fmt, "i", "1M")
    assert ours.code == 1
    assert "absent" in ours.err
    assert Path("i").read_bytes() == b"old"
