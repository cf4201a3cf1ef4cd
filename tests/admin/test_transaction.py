from collections.abc import Sequence

import pytest

from nbdserve.admin.errors import QmpError
from nbdserve.admin.transaction import Abort, Action, execute
from nbdserve.block.node import Node
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage


class Noted(Action):
    def __init__(self, name: str, log: list[str], node: Node, *, fails: bool = False) -> None:
        self.name, self.log, self.node, self.fails = name, log, node, fails

    def nodes(self) -> Sequence[Node]:
        return [self.node]

    async def prepare(self) -> None:
        assert self.node.gate.closed
        if self.fails:
            raise OSError(5, "no")
        self.log.append(f"prepare {self.name}")

    def commit(self) -> None:
        self.log.append(f"commit {self.name}")

    async def abort(self) -> None:
        self.log.append(f"abort {self.name}")


async def test_all_or_none_while_clients_wait() -> None:
    node = Node([await RawDriver.open(MemoryStorage(bytes(512)), {}, read_only=False)])
    log: list[str] = []
    await execute([Noted("a", log, node), Noted("b", log, node)])
    assert log == ["prepare a", "prepare b", "commit a", "commit b"]
    assert not node.gate.closed
    for last in (Noted("c", log, node, fails=True), Abort()):
        log.clear()
        with pytest.raises((OSError, QmpError)):
            await execute([Noted("a", log, node), Noted("b", log, node), last])
        assert log == ["prepare a", "prepare b", "abort b", "abort a"]
        assert not node.gate.closed
