from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nbdserve.cli.image.raw_cow import renamed
from tests.cli.image.helpers import Ran, image, qemu_img
from tests.support.images import needs_qemu

pytestmark = needs_qemu
OPTIONS = "backing_file=ubuntu.img,backing_fmt=qcow2,raw_file=my_vm.img"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the image of the proposal of 2011 in it."""
    monkeypatch.chdir(tmp_path)
    qemu_img("create", "-q", "-f", "qcow2", "ubuntu.img", "5M")
    qemu_io("ubuntu.img", "write -P 1 0 3M")
    ran = image(monkeypatch, "create", "-f", "raw-cow", "-o", OPTIONS, "my_vm.raw-cow")
    assert ran.code == 0, ran.err
    return tmp_path


def qemu_io(name: str, *commands: str) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *arguments, name], check=True, stdout=subprocess.DEVNULL)


def good(ran: Ran) -> Ran:
    assert ran.code == 0, ran.err
    return ran


def test_info_prints_the_raw_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = good(image(monkeypatch, "info", "my_vm.raw-cow")).out
    assert "file format: raw-cow" in text
    assert "backing file: ubuntu.img" in text
    assert "    raw file: my_vm.img\n" in text
    assert "    raw file stands alone: false\n" in text
    Path("my_vm.img").unlink()
    facts = good(image(monkeypatch, "info", "--output", "json", "my_vm.raw-cow")).json()
    assert facts["format-specific"]["data"]["raw-file"] == "my_vm.img"


def test_there_and_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = good(image(monkeypatch, "raw-cow", "export", "my_vm.raw-cow", "my_vm.qcow2")).out
    assert "'my_vm.qcow2'" in said
    assert "'my_vm.img'" in said
    assert good(qemu_img("compare", "my_vm.qcow2", "ubuntu.img")).out == "Images are identical.\n"
    qemu_io("my_vm.qcow2", "write -P 9 1M 100k", "write -z 2M 128k")
    Path("my_vm.raw-cow").unlink()
    said = good(image(monkeypatch, "raw-cow", "import", "my_vm.qcow2", "my_vm.raw-cow")).out
    assert "131072 bytes of the raw file became zeroes" in said
    good(image(monkeypatch, "check", "my_vm.raw-cow"))
    good(image(monkeypatch, "raw-cow", "export", "-q", "my_vm.raw-cow", "again.qcow2"))
    assert good(qemu_img("compare", "my_vm.qcow2", "again.qcow2")).out == "Images are identical.\n"
    assert good(qemu_img("check", "again.qcow2"))
    assert not list(folder.glob(".*"))


def test_a_whole_image_stands_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(image(monkeypatch, "raw-cow", "export", "my_vm.raw-cow", "my_vm.qcow2"))
    qemu_io("my_vm.qcow2", "write -P 3 0 5M")
    good(image(monkeypatch, "raw-cow", "import", "my_vm.qcow2", "whole.raw-cow"))
    text = good(image(monkeypatch, "info", "whole.raw-cow")).out
    assert "raw file stands alone: true" in text
    assert "my_vm.img is the whole disk, in format raw" in text
    assert good(qemu_img("compare", "-F", "raw", "my_vm.qcow2", "my_vm.img")).out == "Images are identical.\n"


def test_names_follow_the_image_to_another_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sub").mkdir()
    good(image(monkeypatch, "raw-cow", "export", "my_vm.raw-cow", "sub/vm.qcow2"))
    monkeypatch.chdir("sub")
    assert good(qemu_img("compare", "vm.qcow2", "../ubuntu.img")).out == "Images are identical.\n"
    ran = image(monkeypatch, "raw-cow", "import", "vm.qcow2", "vm.raw-cow")
    assert ran.code == 1
    assert "leads outside the image roots" in ran.err
    good(image(monkeypatch, "raw-cow", "import", "--image-root", "..", "vm.qcow2", "vm.raw-cow"))
    text = good(image(monkeypatch, "info", "vm.raw-cow")).out
    assert "raw file: ../my_vm.img" in text
    assert "backing file: ../ubuntu.img" in text


@pytest.mark.parametrize("command", ["export", "import"])
def test_no_file_is_replaced(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("there").write_text("kept")
    Path("new.part").write_text("kept")
    good(image(monkeypatch, "raw-cow", "export", "my_vm.raw-cow", "my_vm.qcow2"))
    source = "my_vm.raw-cow" if command == "export" else "my_vm.qcow2"
    ran = image(monkeypatch, "raw-cow", command, source, "there")
    assert (ran.code, Path("there").read_text()) == (1, "kept")
    assert "exists already" in ran.err
    good(image(monkeypatch, "raw-cow", command, source, "new"))
    assert Path("new.part").read_text() == "kept"


@pytest.mark.parametrize("source", ["ubuntu.img", "my_vm.raw-cow", "missing"])
def test_what_is_no_qcow2_with_a_data_file_is_not_imported(
    source: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = image(monkeypatch, "raw-cow", "import", source, "new")
    assert ran.code == 1
    assert ran.err.startswith(f"nbdserve: {source}: ")
    assert sorted(path.name for path in folder.iterdir()) == ["my_vm.img", "my_vm.raw-cow", "ubuntu.img"]


def test_an_image_that_names_itself_is_not_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu_img("create", "-f", "qcow2", "-o", "data_file=evil.dat", "evil.img", "1M")
    evil = Path("evil.img")
    evil.write_bytes(evil.read_bytes().replace(b"evil.dat", b"evil.img"))
    before = evil.read_bytes()
    ran = image(monkeypatch, "raw-cow", "import", "evil.img", "new")
    assert ran.code == 1
    assert "it is the image itself" in ran.err
    assert evil.read_bytes() == before
    assert not Path("new").exists()


def test_relative_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("a")
    assert renamed("x", f"{tmp_path}/one", f"{tmp_path}/two") == "x"
    assert renamed("x", f"{tmp_path}/a/one", f"{tmp_path}/b/two") == "x"
    assert renamed("x", f"{tmp_path}/a/one", f"{tmp_path}/two") == "a/x"
    assert renamed("d/x", f"{tmp_path}/one", f"{tmp_path}/a/two") == "../d/x"
    assert renamed("/x", f"{tmp_path}/one", f"{tmp_path}/a/two") == "/x"


def test_check_looks_at_every_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(*options: str) -> tuple[int, str]:
        ran = image(monkeypatch, "check", *options, "my_vm.raw-cow")
        return ran.code, ran.err

    assert checked() == (0, "")
    os.utime("ubuntu.img", (1 << 30, 1 << 30))
    code, said = checked()
    assert (code, "changed at 2004-01-10 13:37:04 UTC" in said) == (0, True)
    Path("ubuntu.img").rename("gone")
    code, said = checked()
    assert (code, "backing file = 'ubuntu.img': cannot be opened" in said) == (1, True)
    Path("gone").rename("ubuntu.img")
    Path("my_vm.img").rename("gone")
    code, said = checked()
    assert (code, "raw file = 'my_vm.img': cannot be opened" in said) == (1, True)
    Path("gone").rename("my_vm.img")
    with Path("my_vm.raw-cow").open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff")
    os.truncate("my_vm.img", 65536)
    code, said = checked()
    assert (code, "7 clusters that should be in it are cut off" in said) == (2, True)
    assert checked("-r", "all")[0] == 0
    assert Path("my_vm.img").stat().st_size == 5 << 20


def test_an_imported_image_remembers_its_backing_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(image(monkeypatch, "raw-cow", "export", "my_vm.raw-cow", "my_vm.qcow2"))
    good(image(monkeypatch, "raw-cow", "import", "my_vm.qcow2", "again.raw-cow"))
    assert good(image(monkeypatch, "check", "again.raw-cow")).err == ""
    os.utime("ubuntu.img", (1 << 30, 1 << 30))
    assert "WARNING the backing file 'ubuntu.img' was changed" in image(monkeypatch, "check", "again.raw-cow").err


def test_a_raw_file_that_is_the_backing_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "backing_file=ubuntu.img,backing_fmt=qcow2,raw_file=./ubuntu.img"
    ran = image(monkeypatch, "create", "-f", "raw-cow", "-o", options, "new.raw-cow")
    assert (ran.code, ran.err) == (1, "nbdserve: ubuntu.img: the backing file and the data file are the same file\n")
    assert not Path("new.raw-cow").exists()
