"""What can be made, and what an image says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.qcow2.format import Qcow2Format
from tests.formats.qcow2.engine import create, open_image
from tests.support.images import needs_qemu


def test_options_are_judged_before_a_file_is_touched() -> None:
    Qcow2Format.validate_create(1 << 30, {"cluster_size": "4k"})
    with pytest.raises(ConfigError, match="cluster_size"):
        Qcow2Format.validate_create(1 << 30, {"cluster_size": "5k"})
    assert Qcow2Format.created_size(1000, {}) == 1024
    assert Qcow2Format.created_companions("a", 512, {"data_file": "b"}) == ("b",)
    assert Qcow2Format.encrypts({"encrypt.format": "luks"})
    assert not Qcow2Format.encrypts({})


@needs_qemu
async def test_facts(tmp_path: Path) -> None:
    driver = await open_image(create(tmp_path / "a.qcow2", 1 << 20, "compat=0.10"), read_only=True)
    info = driver.info()
    assert (info.virtual_size, info.cluster_size, info.snapshots) == (1 << 20, 65536, [])
    assert info.specific == {"compat": "0.10", "compression-type": "zlib", "refcount-bits": 16}
    await driver.close()
