from __future__ import annotations

import pytest

from nbdserve.block.node import Node
from nbdserve.errors import ConfigError
from nbdserve.formats.registry import driver_for
from nbdserve.jobs.measure import measurable, measure_empty, measure_node
from tests.block.layers import Scripted


def test_formats() -> None:
    assert [name for name in ("raw", "qcow2", "vdi", "luks") if measurable(driver_for(name))] == ["raw", "qcow2"]


def test_an_empty_disk() -> None:
    assert measure_empty(driver_for("raw"), 12345, {}) == (12345, 12345)
    assert measure_empty(driver_for("qcow2"), 1 << 30, {}) == (393216, 1074135040)
    with pytest.raises(ConfigError):
        measure_empty(driver_for("qcow2"), 1 << 30, {"cluster_size": "3"})


async def test_each_cluster_that_holds_data_counts_once() -> None:
    node = Node([Scripted("D" + "Z" * 126 + "D" + "Z" * 128 + "ZD" * 60 + "ZZZZ", "a")])
    required, full = await measure_node(driver_for("qcow2"), node, {"cluster_size": "512"})
    empty, _ = measure_empty(driver_for("qcow2"), node.size, {"cluster_size": "512"})
    assert required - empty == 2 * 512
    assert full - empty == -(-node.size // 512) * 512
