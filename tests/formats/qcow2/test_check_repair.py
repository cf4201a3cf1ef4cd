import shutil
from pathlib import Path

import pytest

from nbdserve.cli.image.check import as_json
from nbdserve.formats.qcow2.check_repair import repair
from nbdserve.storage.file import FileStorage
from tests.formats.qcow2.broken import CASES, Broken, make, make_good_images, qemu_check
from tests.support.images import needs_qemu, run

pytestmark = needs_qemu

OURS_DIFFERS = {"block with reserved bits", "block misaligned", "block outside", "no block"}
"""A new refcount structure is made where QEMU gives up, or finds another place for it."""


@pytest.fixture(scope="module")
def good_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    make_good_images(directory)
    return directory


@pytest.mark.parametrize("errors", [False, True], ids=["leaks", "all"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_what_is_repaired_is_what_qemu_img_repairs(case: Broken, errors: bool, good_images: Path) -> None:
    image, theirs = good_images / "broken", good_images / "theirs"
    make(case, good_images, image)
    shutil.copy(image, theirs)
    storage = await FileStorage.open(str(image))
    try:
        result = await repair(storage, errors=errors)
    finally:
        await storage.close()
    _, expected = qemu_check(theirs, "-r", "all" if errors else "leaks")
    if case.name in OURS_DIFFERS or not expected:
        if errors:
            assert qemu_check(image)[0] == 0
        return
    assert as_json(result) == expected
    assert qemu_check(image)[0] == qemu_check(theirs)[0]


async def test_data_survives_a_new_refcount_structure(good_images: Path) -> None:
    image = good_images / "broken"
    make(next(case for case in CASES if case.name == "no block"), good_images, image)
    storage = await FileStorage.open(str(image))
    try:
        await repair(storage, errors=True)
    finally:
        await storage.close()
    run("qemu-img", "compare", image, good_images / "plain")


class Crash(Exception):
    pass


async def test_a_crash_before_the_header_is_swapped_leaves_the_old_structure(
    good_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = good_images / "broken"
    make(next(case for case in CASES if case.name == "refcount 0"), good_images, image)
    before = qemu_check(image)[1]
    storage = await FileStorage.open(str(image))

    async def crash() -> None:
        raise Crash

    monkeypatch.setattr(storage, "flush", crash)
    with pytest.raises(Crash):
        await repair(storage, errors=True)
    await storage.close()
    after = qemu_check(image)[1]
    assert after["corruptions"] == before["corruptions"]
    run("qemu-img", "compare", image, good_images / "plain")
