from pathlib import Path

import pytest

from nbdserve.cli.image.check import as_json
from nbdserve.formats.qcow2 import check_analysis, check_walk
from nbdserve.formats.qcow2.check_analysis import analyse
from nbdserve.storage.file import FileStorage
from tests.formats.qcow2.broken import CASES, Broken, make, make_good_images, qemu_check
from tests.support.images import needs_qemu, run

pytestmark = needs_qemu


@pytest.fixture(scope="module")
def good_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    make_good_images(directory)
    return directory


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_the_counters_are_those_of_qemu_img(case: Broken, good_images: Path) -> None:
    image = good_images / "broken"
    make(case, good_images, image)
    storage = await FileStorage.open(str(image), read_only=True)
    try:
        analysis = await analyse(storage)
    finally:
        await storage.close()
    _, expected = qemu_check(image)
    assert as_json(analysis.result) == expected


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3], CASES[7]], ids=lambda case: case.name)
async def test_several_windows_find_what_one_does(
    case: Broken, good_images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    run("qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=512", good_images / case.base, image)
    storage = await FileStorage.open(str(image), read_only=True)
    try:
        one = await analyse(storage)
        monkeypatch.setattr(check_walk, "WINDOW_CLUSTERS", 512)
        monkeypatch.setattr(check_analysis, "WINDOW_CLUSTERS", 512)
        assert as_json((await analyse(storage)).result) == as_json(one.result)
    finally:
        await storage.close()
