import pytest

from nbdserve.admin.errors import QmpError
from nbdserve.admin.nodes import NodeEntry, NodeTable
from nbdserve.block.node import Node
from nbdserve.formats.raw import RawDriver
from nbdserve.storage.memory import MemoryStorage


async def entry(name: str) -> NodeEntry:
    return NodeEntry(name, "raw", Node([await RawDriver.open(MemoryStorage(bytes(512)), {}, read_only=False)]))


async def test_names() -> None:
    table = NodeTable()
    table.add(await entry("disk"))
    assert table.fitting_name("disk") == "disk-1"
    assert table.fitting_name("ä b/c.raw") == "disk--b-c.raw"
    assert table.fitting_name("9") == "disk-9"
    assert table.fitting_name("") == "disk-1"
    long = table.fitting_name("x" * 50)
    table.add(await entry(long))
    assert table.fitting_name("x" * 50) == "x" * 29 + "-1"
    for name, problem in (("disk", "Duplicate"), ("#x", "Invalid"), ("x" * 32, "too long")):
        with pytest.raises(QmpError, match=problem):
            table.check_name(name)


async def test_who_is_used_is_not_deleted() -> None:
    table = NodeTable()
    below, above = await entry("below"), await entry("above")
    above.children = [below]
    below.users = [above.label]
    table.add(below)
    table.add(above)
    with pytest.raises(QmpError, match="Block device below is in use"):
        table.remove("below")
    await table.remove("above").close()
    below.users.append("job 'j'")
    with pytest.raises(QmpError, match="Node below is in use"):
        table.remove("below")
    below.users.clear()
    assert table.remove("below") is below


async def test_layers_are_found_by_name() -> None:
    table = NodeTable()
    chain = NodeEntry("top", "raw", Node([*(await entry("a")).node.layers, *(await entry("b")).node.layers]))
    table.add(chain)
    ((name, layer),) = table.parts(chain)
    assert layer is chain.node.layers[1]
    assert table.layer(name) == (chain, 1)
    assert table.layer("top") == (chain, 0)
    assert table.find(name) is chain
    with pytest.raises(QmpError, match="Cannot find device='x' nor node-name='x'"):
        table.layer("x")


async def test_closing_closes_what_commands_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    table = NodeTable()
    kept, broken, other = await entry("kept"), await entry("broken"), await entry("other")
    kept.permanent = True
    for each in (kept, broken, other):
        table.add(each)

    async def fail() -> None:
        raise OSError(5, "lost")

    monkeypatch.setattr(broken.node, "close", fail)
    with pytest.raises(OSError, match="lost"):
        await table.close()
    assert list(table) == [kept]
    with pytest.raises(OSError, match="closed"):
        await other.node.read(0, 1)
