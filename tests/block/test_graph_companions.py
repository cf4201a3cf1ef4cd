"""Images of several files: which are opened, how, and what is refused; and what the layer above sees of its parent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserve.block import graph
from nbdserve.block.graph import open_alone, open_image
from nbdserve.block.spec import ImageSpec
from nbdserve.errors import ConfigError, ImageError
from nbdserve.formats import registry
from nbdserve.storage.file import FileStorage
from tests.formats.parts import PartsDriver

SIZE = 4096


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry.DRIVERS, "parts", PartsDriver)
    yield
    PartsDriver.opened.clear()


def _image(folder: Path, *lines: str, name: str = "image") -> Path:
    path = folder / name
    path.write_text("\n".join(lines))
    for line in lines:
        part = folder / line.lstrip("+-")
        if line[0] not in "<=!*" and not part.exists():
            part.write_bytes(line[-1].encode() * SIZE)
    return path


def _spec(
    path: Path, *, read_only: bool = False, backing: ImageSpec | None = None, secret: bytes | None = None
) -> ImageSpec:
    return ImageSpec(str(path), "parts", read_only=read_only, backing=backing or "header", secret=secret)


def _open_files(folder: Path) -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:
            continue
    return sorted(target for target in found if target.startswith(str(folder)))


async def _refused(folder: Path, spec: ImageSpec, kind: type[Exception] = ImageError) -> str:
    with pytest.raises(kind) as caught:
        await open_image(spec)
    assert _open_files(folder) == []
    return str(caught.value)


async def test_the_files_are_opened_in_order_as_the_image_is(tmp_path: Path) -> None:
    for read_only in (False, True):
        node = await open_image(_spec(_image(tmp_path, "a", "-b", "+c", "*"), read_only=read_only, secret=b"s"))
        driver = PartsDriver.opened[-1]
        assert [part.path for part in driver.parts] == [str(tmp_path / name) for name in "abc"]
        assert [part.read_only for part in driver.parts] == [read_only, True, read_only]
        assert driver.options["secret"] == b"s"
        assert driver.options["discard"] == "ignore"
        assert driver.options["has_backing"] is False
        assert await node.read(0, 3) == b"aaa"
        await node.close()
        assert _open_files(tmp_path) == []


@pytest.mark.parametrize(
    ("lines", "field", "value"),
    [
        (["a", "../outside"], "part", "'../outside'"),
        (["a", "absent"], "part", "'absent'"),
        (["a", "image"], "part", "'image'"),
        (["a", "b", "-a"], "part", "'a'"),
        (["a", "b", "!"], "line", "'!'"),
    ],
)
async def test_a_file_that_cannot_be_opened_leaves_none_open(
    tmp_path: Path, lines: list[str], field: str, value: str
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    image = _image(folder, *lines)
    (folder / "absent").unlink(missing_ok=True)
    message = await _refused(tmp_path, _spec(image))
    assert message.startswith(str(image))
    assert field in message
    assert value in message


async def test_an_image_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "MAX_COMPANIONS", 2)
    assert "'c'" in await _refused(tmp_path, _spec(_image(tmp_path, "a", "b", "c")))


async def test_a_data_file_cannot_be_chosen_where_the_format_has_none(tmp_path: Path) -> None:
    image = _image(tmp_path, "a")
    spec = ImageSpec(str(image), "parts", data_file=ImageSpec(str(tmp_path / "a"), "raw"))
    assert "parts images have no external data file" in await _refused(tmp_path, spec, ConfigError)


async def test_a_chosen_data_file_is_refused_where_the_image_holds_its_data(tmp_path: Path) -> None:
    storage = await FileStorage.open(str(tmp_path / "q"), create=True)
    await registry.DRIVERS["qcow2"].create(storage, SIZE, {})
    await storage.close()
    (tmp_path / "d").write_bytes(bytes(SIZE))
    spec = ImageSpec(str(tmp_path / "q"), "qcow2", data_file=ImageSpec(str(tmp_path / "d"), "raw"))
    assert "holds its data itself" in await _refused(tmp_path, spec)


@pytest.mark.parametrize("named", [True, False])
async def test_the_layer_below_is_shown_to_the_one_above_it_once(tmp_path: Path, named: bool) -> None:
    base = _image(tmp_path, "b", name="base")
    image = _image(tmp_path, "a", *(["<base"] if named else []), "=base")
    node = await open_image(_spec(image, backing=None if named else _spec(base, read_only=True)))
    top, below = node.layers
    assert isinstance(top, PartsDriver)
    assert isinstance(below, PartsDriver)
    assert (top.accepted, below.accepted) == ([below], [])
    assert top.options["has_backing"] is not named
    await node.close()


async def test_a_parent_that_is_not_accepted_leaves_nothing_open(tmp_path: Path) -> None:
    _image(tmp_path, "b", name="base")
    assert "'other'" in await _refused(tmp_path, _spec(_image(tmp_path, "a", "c", "<base", "=other")))


def _tried_secrets() -> list[bytes]:
    return [layer.options["secret"] for layer in PartsDriver.opened if not layer.options["metadata_only"]]


async def test_a_secret_opens_every_layer_that_headers_name(tmp_path: Path) -> None:
    base = _image(tmp_path, "b", "*", name="base")
    node = await open_image(_spec(_image(tmp_path, "a", "<base"), secret=b"pass"))
    assert _tried_secrets() == [b"pass", b"pass"]
    await node.close()
    PartsDriver.opened.clear()
    spec = _spec(_image(tmp_path, "a", "*"), secret=b"pass", backing=_spec(base, read_only=True, secret=b"other"))
    await (await open_image(spec)).close()
    assert _tried_secrets() == [b"pass", b"other"]
    assert "pass" not in repr(spec)


async def test_a_secret_for_what_is_not_encrypted_is_refused(tmp_path: Path) -> None:
    message = await _refused(tmp_path, _spec(_image(tmp_path, "a"), secret=b"pass"), ConfigError)
    assert "not encrypted" in message
    assert "pass" not in message


async def test_alone_neither_backing_nor_guest_data_is_opened(tmp_path: Path) -> None:
    image = _image(tmp_path, "+a", "b", "<absent")
    for read_only in (True, False):
        storage = await FileStorage.open(str(image), read_only=read_only)
        driver = await open_alone(storage, "parts")
        assert isinstance(driver, PartsDriver)
        assert driver.read_only
        assert [part.path for part in driver.parts] == [str(image), str(tmp_path / "b")]
        assert [part.read_only for part in driver.parts] == [read_only, read_only]
        assert driver.options["has_backing"] is True
        assert driver.options["metadata_only"] is True
        await driver.close()
        assert _open_files(tmp_path) == []


async def test_a_failed_open_alone_closes_the_file(tmp_path: Path) -> None:
    storage = await FileStorage.open(str(_image(tmp_path, "a", "!")), read_only=True)
    with pytest.raises(ImageError):
        await open_alone(storage, "parts")
    assert _open_files(tmp_path) == []
