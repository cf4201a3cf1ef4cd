import random
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nbdserve.cli.image.map import HAS_DATA, PRESENT, ZEROES, json_lines, merged
from tests.cli.image.helpers import image, make_chain, qemu_img
from tests.support.geometries import KITS, make, named
from tests.support.images import needs_qemu


@needs_qemu
def test_what_is_printed_is_what_qemu_img_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in make_chain(tmp_path):
        name = path.name
        for part in ([], ["--start-offset", "1000000", "--max-length", "3M"], ["-s", "12M"], ["-l", "0"], ["-s", "2G"]):
            ours = image(monkeypatch, "map", "--output", "json", *part, name)
            assert ours.json() == qemu_img("map", "--output", "json", *part, name).json(), (name, part)
        ours, theirs = image(monkeypatch, "map", name), qemu_img("map", name)
        assert (ours.code, ours.out) == (theirs.code, theirs.out), name


@needs_qemu
@pytest.mark.parametrize("below", ["nothing", "raw", "shorter", "extended", "external"])
def test_partly_filled_clusters_are_mapped_as_by_qemu_img(
    below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Subclusters nobody wrote have an offset where their layer is the last one with that range."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(below)
    size = 4 << 20

    def make(name: str, *arguments: str, count: int = 30) -> None:
        assert qemu_img("create", "-q", "-f", "qcow2", *arguments).code == 0
        commands = []
        for _ in range(count):
            what = rng.choice(("write", "write", "write -z", "write -z -u", "discard"))
            offset, length = rng.randrange(size // 512) * 512, rng.choice((512, 2048, 10240, 65536, 200704))
            commands += ["-c", f"{what} {offset} {min(length, size - offset)}"]
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, name], check=True, stdout=subprocess.DEVNULL)

    options = ["-o", "extended_l2=on,cluster_size=64k"]
    if below == "extended":
        make("base", *options, "base", str(size), count=8)
        options += ["-b", "base", "-F", "qcow2"]
    elif below in ("raw", "shorter"):
        (tmp_path / "base").write_bytes(b"b" * (size if below == "raw" else 1_234_944))
        options += ["-b", "base", "-F", "raw"]
    elif below == "external":
        options[1] += ",data_file=data"
    make("image", *options, "image", str(size))
    theirs = qemu_img("map", "--output", "json", "image").json()
    assert image(monkeypatch, "map", "--output", "json", "image").json() == theirs
    if below != "raw":
        assert any("offset" in row and not row["present"] for row in theirs), "no such subcluster in this image"
    for part in (["-s", "1000448"], ["-s", "99999", "-l", "2M"]):
        ours = image(monkeypatch, "map", "--output", "json", *part, "image")
        assert ours.json() == qemu_img("map", "--output", "json", *part, "image").json(), part


async def test_rows_merge_across_pieces() -> None:
    async def pieces():  # type: ignore[no-untyped-def]
        yield np.array([[0, 10, 0, PRESENT | HAS_DATA, 100], [10, 10, 0, PRESENT | HAS_DATA, 110]])
        yield np.array([[20, 10, 0, PRESENT | HAS_DATA, 120], [30, 5, 0, PRESENT | ZEROES, -1]])
        yield np.array([[35, 5, 0, PRESENT | ZEROES, -1], [40, 5, 1, PRESENT | ZEROES, -1]])

    found = np.concatenate([part async for part in merged(pieces())])
    assert found[:, :2].tolist() == [[0, 30], [30, 10], [40, 5]]


def test_a_row_has_qemu_imgs_layout() -> None:
    lines = json_lines(np.array([[0, 512, 1, PRESENT | HAS_DATA, 7], [512, 1, 0, ZEROES, -1]]))
    assert lines[0] == (
        '{ "start": 0, "length": 512, "depth": 1, "present": true, "zero": false, "data": true, "offset": 7}'
    )
    assert lines[1] == '{ "start": 512, "length": 1, "depth": 0, "present": false, "zero": true, "data": false}'


@pytest.mark.parametrize("option", [["--max-length", "5x"], ["--start-offset", "many"]])
def test_a_bad_size_is_named(option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raw").write_bytes(bytes(512))
    ours = image(monkeypatch, "map", *option, tmp_path / "raw")
    assert ours.code == 1
    assert option[1] in ours.err


@needs_qemu
@pytest.mark.parametrize("fmt", ["qed", "qcow"])
def test_the_user_gives_the_format_of_the_backing_file(
    fmt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert qemu_img("create", "-q", "-f", "qcow2", "base", "4M").code == 0
    assert qemu_img("create", "-q", "-f", fmt, "-b", "base", "-F", "qcow2", "top").code == 0
    for name, write in (("base", "write 1M 1M"), ("top", "write 1536k 128k"), ("top", "write 3M 64k")):
        subprocess.run(["qemu-io", "-c", write, name], check=True, capture_output=True)
    told = f'json:{{"driver": "{fmt}", "file.filename": "top", "backing.driver": "qcow2"}}'
    ours = image(monkeypatch, "map", "--output", "json", told)
    assert ours.json() == qemu_img("map", "--output", "json", "top").json()
    refused = image(monkeypatch, "map", "-f", fmt, "top")
    assert refused.code == 1
    assert "never guessed" in refused.err


@needs_qemu
@pytest.mark.parametrize("name", ["flat", "three", "three-flat", "mixed", "split-child", "stream", "sesparse"])
def test_images_of_several_files_are_mapped_as_by_qemu_img(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offsets count in the file that holds the range, and that file is named."""
    monkeypatch.chdir(tmp_path)
    path, _ = make(named(KITS["vmdk"].all, f"vmdk-{name}"), tmp_path)
    for format_ in ([], ["--output", "json"]):
        ours = image(monkeypatch, "map", *format_, path.name)
        theirs = qemu_img("map", *format_, path.name)
        assert ours.code == theirs.code
        assert (ours.json() == theirs.json()) if format_ else (ours.out == theirs.out)
