import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdserve.app import ExportPlan, Plan, serve
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.nbd_client import Client, describe, list_exports
from nbdserve.errors import ConfigError, OptionError
from nbdserve.server.addresses import Address, TcpAddress, unix_address


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[Address]:
    """A server of "disk", 64 KiB, of which the first 4 KiB are x."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"x" * 4096)
    with disk.open("r+b") as file:
        file.truncate(65536)
    listening: asyncio.Future[list[Address]] = asyncio.get_running_loop().create_future()
    plan = Plan([ExportPlan("disk", ImageSpec(str(disk), "raw"), "text")], [unix_address(str(tmp_path / "s"))])
    task = asyncio.create_task(serve(plan, listening.set_result))
    yield (await listening)[0]
    task.cancel()
    await asyncio.wait({task})


async def test_list_and_describe(address: Address) -> None:
    assert await asyncio.to_thread(list_exports, address) == (("disk", "text"),)
    export = await asyncio.to_thread(describe, address, "disk")
    assert (export.size, export.description) == (65536, "text")
    assert [name for _, name in export.contexts] == ["base:allocation"]
    with pytest.raises(OptionError):
        await asyncio.to_thread(describe, address, "other")


async def test_read_and_status(address: Address) -> None:
    def use() -> None:
        with Client(address, "disk") as client:
            assert client.read(4000, 200) == b"x" * 96 + bytes(104)
            assert client.block_status(0, 65536) == {"base:allocation": [(4096, 0), (61440, 3)]}
            with pytest.raises(OSError, match="READ"):
                client.read(65536, 1)
            assert client.read(0, 1) == b"x"

    await asyncio.to_thread(use)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot connect to unix:"):
        list_exports(unix_address(str(tmp_path / "absent")))
    with pytest.raises(ConfigError, match=r"cannot connect to 127\.0\.0\.1:1"):
        Client(TcpAddress("127.0.0.1", 1))
