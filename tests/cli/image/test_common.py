import json
from pathlib import Path

import pytest

from nbdserve.cli.image.common import check_cache, full_name, open_layer, parsed_size
from nbdserve.errors import ConfigError, ImageError
from nbdserve.storage.file import FileStorage
from tests.cli.image.helpers import Ran, image, qemu_img


@pytest.mark.parametrize(
    ("image", "named", "full"),
    [
        ("i", "b", "b"),
        ("d/i", "b", "d/b"),
        ("/d/i", "../b", "/d/../b"),
        ("d/i", "/b", "/b"),
    ],
)
def test_a_relative_name_begins_at_the_image(image: str, named: str, full: str) -> None:
    assert full_name(image, named) == full


async def test_a_layer_is_probed_or_opened_as_told(tmp_path: Path) -> None:
    path = tmp_path / "i"
    path.write_bytes(b"QFI\xfb\0\0\0\3")
    with pytest.raises(ImageError):
        await open_layer(str(path), None)
    driver = await open_layer(str(path), "raw")
    assert (driver.name, driver.read_only, driver.storage.read_only) == ("raw", True, True)
    await driver.storage.close()
    with pytest.raises(ConfigError):
        await open_layer(str(path), "nope")
    await (await FileStorage.open(str(path))).close()  # none of these left the file locked


def test_cache_modes() -> None:
    assert check_cache("none", "source cache option") == "none"
    with pytest.raises(ConfigError, match="Invalid source cache option: no: use one of none, writeback, "):
        check_cache("no", "source cache option")


def test_sizes() -> None:
    assert (parsed_size("4k", "offset"), parsed_size("9", "offset", 9, 9)) == (4096, 9)
    with pytest.raises(ConfigError, match="Invalid offset specified: "):
        parsed_size("there", "offset")
    for text in ("8", "10"):
        with pytest.raises(ConfigError, match=r"Invalid offset specified\. Must be between 9 and 9\."):
            parsed_size(text, "offset", 9, 9)


@pytest.mark.parametrize("options", ["offset=512", "size=512"])
def test_a_part_of_a_file_is_not_taken_for_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    ran = image(monkeypatch, "info", "--image-opts", f"driver=raw,{options},file.filename={tmp_path / 'image'}")
    assert (ran.code, ran.out, "offset and size are not supported here" in ran.err) == (1, "", True)


@pytest.mark.parametrize(
    "command",
    [
        ["info"],
        ["check"],
        ["map"],
        ["amend", "-o", "lazy_refcounts=on"],
        ["snapshot"],
        ["resize", "IMAGE", "+1M"],
        ["rebase", "-b", ""],
        ["commit"],
    ],
)
def test_an_image_may_be_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    assert qemu_img("create", "-f", "raw", tmp_path / "base", "1M").code == 0
    file = tmp_path / "image"
    assert qemu_img("create", "-f", "qcow2", "-b", "base", "-F", "raw", file).code == 0
    text = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(file)}})

    def run(*options: str, described: str) -> Ran:
        verb, *rest = [described if word == "IMAGE" else word for word in command]
        return image(monkeypatch, verb, *options, *rest, *([] if "IMAGE" in command else [described]))

    for done in (run(described=f"json:{text}"), run("--image-opts", described=f"driver=qcow2,file.filename={file}")):
        assert (done.code, done.err) == (0, "")
    both = run("--image-opts", "-f", "qcow2", described=f"driver=qcow2,file.filename={file}")
    assert (both.code, both.err) == (1, "nbdserve: --image-opts and --format are mutually exclusive\n")
