import pytest

from nbdserve.admin.control import Control
from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry
from nbdserve.block.node import Node
from nbdserve.exports.export import Export
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage


async def test_an_export_keeps_its_node(control: Control) -> None:
    node = Node([await RawDriver.open(MemoryStorage(bytes(512)), {}, read_only=False)])
    entry = NodeEntry("n", "raw", node)
    exports = control.exports
    with pytest.raises(QmpError, match="NBD server not running"):
        exports.add("e", entry, Export("x", node))
    exports.listening = True
    exports.add("e", entry, Export("x", node))
    assert entry.users == ["export 'e'"]
    assert control.server.exports.find("x") is exports.get("e").export
    for identity, name, problem in (("e", "y", "id 'e' is already"), ("f", "x", "has export named 'x'")):
        with pytest.raises(QmpError, match=problem):
            exports.add(identity, entry, Export(name, node))
    exports.get("e").export.connections = 1
    with pytest.raises(QmpError, match="still in use"):
        exports.remove("e")
    exports.remove("e", "hard")
    assert entry.users == []
    assert control.server.exports.find("x") is None
