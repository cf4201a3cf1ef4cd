import gc
from typing import Any

from nbdserve.admin.events import Events
from nbdserve.admin.thresholds import Thresholds
from nbdserve.block.node import Node
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage


async def new_node() -> Node:
    return Node([await RawDriver.open(MemoryStorage(bytes(4096)), {}, read_only=False)])


async def test_they_are_told_of_once() -> None:
    events, node = Events(), await new_node()
    told: list[Any] = []
    events.subscribe(lambda event: told.append(event["data"]))
    thresholds = Thresholds(events)
    thresholds.set("n", node, None, 9999)
    thresholds.set("n", node, None, 1000)
    assert thresholds.get(node) == 1000
    await node.write(0, b"x" * 1000)
    assert told == []
    for _ in range(2):
        await node.write(512, b"x" * 512)
    assert told == [{"node-name": "n", "amount-exceeded": 24, "write-threshold": 1000}]
    assert thresholds.get(node) == 0
    thresholds.set("n", node, None, 1)
    thresholds.set("n", node, None, 0)
    await node.write(512, b"x" * 512)
    assert len(told) == 1


async def test_of_the_file_under_a_disk_and_of_one_that_is_gone() -> None:
    events, node = Events(), await new_node()
    told: list[Any] = []
    events.subscribe(lambda event: told.append(event["data"]["amount-exceeded"]))
    thresholds = Thresholds(events)
    thresholds.set("f", node, node.data, 4000)
    assert thresholds.get(node.data) == 4000
    assert thresholds.get(node) == 0
    await node.write(0, b"x")
    assert told == [96]
    thresholds.set("f", node, node.data, 5000)
    del node
    gc.collect()
    assert len(thresholds._set) == 0
