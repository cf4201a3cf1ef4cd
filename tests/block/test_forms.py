"""Forms of requests that do not wait, for nodes that are held back or have shrunk; ``test_drain`` has the clients."""

from __future__ import annotations

from nbdserve.block import forms
from nbdserve.block.node import Node
from nbdserve.block.writer import WRITE_DONE, WRITE_WAIT
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage
from nbdserve.units import KIB


async def _node() -> Node:
    return Node([await RawDriver.open(MemoryStorage(size=64 * KIB), {}, read_only=False)])


async def test_nothing_is_done_on_a_node_that_is_held_back() -> None:
    node = await _node()
    buffer = memoryview(bytearray(4))
    assert node.submit_write(0, memoryview(b"data"), lambda error: None) == WRITE_DONE
    forms.refuse_all(node)
    assert node.submit_write(0, memoryview(b"more"), lambda error: None) == WRITE_WAIT
    assert node.try_read_into(0, buffer) == forms.READ_WAIT
    assert node.try_read_pieces(0, buffer) is None
    assert node.locate_read(0, 4) is None
    assert await node.read(0, 4) == b"data"


async def test_outside_of_a_disk_that_has_shrunk_nothing_is_done() -> None:
    node = await _node()
    node.size = 32 * KIB
    forms.refuse_outside(node)
    buffer = memoryview(bytearray(4))
    for offset, inside in ((32 * KIB - 4, True), (32 * KIB - 3, False), (40 * KIB, False)):
        assert (node.try_read_into(offset, buffer) != forms.READ_WAIT) is inside
        assert (node.try_read_pieces(offset, buffer) is not None) is inside
        assert (node.locate_read(offset, 4) is not None) is inside
        written = node.submit_write(offset, memoryview(b"data"), lambda error: None)
        assert (written == WRITE_DONE) is inside
