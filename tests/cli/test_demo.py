from pathlib import Path

import pytest

from nbdserve.cli.demo import BASE, OVERLAY, build
from nbdserve.errors import ConfigError
from tests.cli.processes import NBDSERVE, needs, output, started, stop


def test_once_ends_with_a_client_reading_data(tmp_path: Path) -> None:
    told = output(*NBDSERVE, "demo", "--once", "--dir", tmp_path)
    assert f"written into {BASE}" in told
    assert f"written through {OVERLAY}" in told
    assert told.endswith("All 64 MiB read and compared: equal.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [BASE, OVERLAY]


@needs("nbdinfo", "qemu-img")
def test_serves_until_stopped_and_what_it_says_works(tmp_path: Path) -> None:
    with started(*NBDSERVE, "demo", "--dir", tmp_path) as server:
        assert server.stdout is not None
        lines = [server.stdout.readline().strip() for _ in range(9)]
        for uri in (lines[1].strip("'"), lines[2]):
            assert "67108864" in output("nbdinfo", "--size", uri)
        assert stop(server) == 0
    for name in (BASE, OVERLAY):
        output("qemu-img", "check", tmp_path / name)


async def test_images_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / BASE).write_text("precious")
    with pytest.raises(ConfigError, match=BASE):
        await build(tmp_path)
    assert (tmp_path / BASE).read_text() == "precious"


async def test_images_made_before_are_used_again(tmp_path: Path) -> None:
    await build(tmp_path)
    before = (tmp_path / OVERLAY).read_bytes()
    await build(tmp_path)
    assert (tmp_path / OVERLAY).read_bytes() == before
