"""The composition root inside the test's event loop; as a process it is tested in ``tests/cli``."""

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import cast

import pytest

from nbdserve.app import ExportPlan, Plan, Stopping, _drain, exports_of, plan_of, serve
from nbdserve.block.spec import ImageSpec
from nbdserve.cli.nbd_client import Client, list_exports
from nbdserve.config.models import Config, ServerOptions
from nbdserve.errors import ConfigError, ImageError, ProtocolError
from nbdserve.server.addresses import Address, TcpAddress, UnixAddress
from nbdserve.server.server import Server, ServerLimits
from tests.admin.clients import RawClient


@pytest.fixture
def image(tmp_path: Path) -> ImageSpec:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 65536)
    return ImageSpec(str(path), "raw")


@pytest.fixture
def sock(tmp_path: Path) -> UnixAddress:
    return UnixAddress(str(tmp_path / "s"))


async def running(plan: Plan) -> tuple["asyncio.Task[None]", list[Address]]:
    listening: asyncio.Future[list[Address]] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(plan, listening.set_result))
    await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    return task, listening.result()


def test_plan_of() -> None:
    options = ServerOptions(
        listen=["127.0.0.1:1"], default_export="d", image_roots=["/r"], exit_last=True, max_clients=3, max_handshakes=4,
        request_memory=1 << 29,
        handshake_seconds=5, drain_seconds=6, pid_file="p",
    )  # fmt: skip
    assert plan_of(options, []) == Plan(
        [], [TcpAddress("127.0.0.1", 1)], (), ServerLimits(5, 4, 3, 1 << 29), "d", ["/r"], True, 6, "p"
    )
    assert plan_of(ServerOptions(), []) == Plan([], [TcpAddress("127.0.0.1", 10809)], image_roots=[])


def test_exports_of() -> None:
    config = Config.model_validate({"exports": {"a": {"path": "x", "max_connections": 2, "allocation_depth": True}}})
    assert exports_of(config) == [ExportPlan("a", ImageSpec("x"), "", True, 2)]
    with pytest.raises(ConfigError, match=r"\[exports\.b\] image 'json:"):
        exports_of(Config.model_validate({"exports": {"b": {"path": "json:{"}}}))


async def test_several_listeners_and_a_signal(tmp_path: Path, image: ImageSpec, sock: UnixAddress) -> None:
    pid_file = tmp_path / "pid"
    plan = Plan([ExportPlan("a", image)], [sock, TcpAddress("127.0.0.1", 0)], pid_file=str(pid_file))
    task, addresses = await running(plan)
    for address in addresses:
        assert await asyncio.to_thread(list_exports, address) == (("a", ""),)
    assert pid_file.read_text() == f"{os.getpid()}\n"
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 60)
    assert not Path(sock.path).exists()


async def test_an_admin_socket(tmp_path: Path, image: ImageSpec, sock: UnixAddress) -> None:
    admin = UnixAddress(str(tmp_path / "admin"))
    task, _ = await running(Plan([ExportPlan("a", image)], [sock], admin=[admin]))
    client = await asyncio.to_thread(lambda: RawClient(admin.path).negotiate())
    beside = {"type": "unix", "data": {"path": f"{admin.path}2"}}
    assert await asyncio.to_thread(client.execute, "nbd-server-start", addr=beside) == {}
    assert await asyncio.to_thread(client.execute, "quit") == {}
    assert (await asyncio.to_thread(client.receive))["event"] == "SHUTDOWN"
    client.close()
    await asyncio.wait_for(task, 60)
    assert not Path(admin.path).exists()
    with pytest.raises(ConfigError, match="::1 only"):
        await running(Plan([ExportPlan("a", image)], [sock], admin=[TcpAddress("*", 0)]))


async def test_end_with_the_last_client(image: ImageSpec, sock: UnixAddress) -> None:
    task, _ = await running(Plan([ExportPlan("a", image)], [sock], exit_last=True))
    assert await asyncio.to_thread(list_exports, sock)
    client = await asyncio.to_thread(Client, sock)
    assert not task.done()
    await asyncio.to_thread(client.close)
    await asyncio.wait_for(task, 60)


async def test_idle_clients_do_not_hold_up_the_end(image: ImageSpec, sock: UnixAddress) -> None:
    task, _ = await running(Plan([ExportPlan("a", image)], [sock], drain_seconds=3600))
    client = await asyncio.to_thread(Client, sock)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(task, 60)
    with pytest.raises((OSError, ProtocolError)):
        client.read(0, 1)
    client.close()


async def test_a_second_signal_cuts_draining_short() -> None:
    stops: list[float] = []

    class Busy:
        async def stop(self, seconds: float) -> None:
            stops.append(seconds)
            await asyncio.sleep(seconds)

    stopping = Stopping(asyncio.get_running_loop())
    draining = asyncio.create_task(_drain(cast("Server", Busy()), 3600, stopping))
    for signalled in (stopping.first, stopping.second):
        assert not draining.done()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(signalled, 60)
    await asyncio.wait_for(draining, 60)
    assert stops == [3600, 0]


@pytest.mark.parametrize("default", ["nope", "/"])
async def test_unknown_default_export(image: ImageSpec, sock: UnixAddress, default: str) -> None:
    with pytest.raises(ConfigError, match=f"default export '{default}'"):
        await running(Plan([ExportPlan("a", image)], [sock], default_export=default))
    assert not Path(sock.path).exists()


async def test_failures_undo_what_was_done(tmp_path: Path, image: ImageSpec, sock: UnixAddress) -> None:
    absent = ImageSpec(str(tmp_path / "absent"), "raw")
    for plan, error in (
        (Plan([ExportPlan("a", image), ExportPlan("b", absent)], [sock]), ImageError),
        (Plan([ExportPlan("a", image), ExportPlan("a", image)], [sock]), (ConfigError, ImageError)),
        (Plan([ExportPlan("a", image)], [sock], pid_file=str(tmp_path / "no" / "pid")), ConfigError),
        (Plan([ExportPlan("x" * 5000, image)], [sock]), ConfigError),
        (Plan([ExportPlan("a", image)], [sock], image_roots=[str(tmp_path / "absent")]), ConfigError),
    ):
        with pytest.raises(error):
            await running(plan)
        assert not Path(sock.path).exists()
        with socket.socket(socket.AF_UNIX) as client:
            assert client.connect_ex(sock.path) != 0
    task, _ = await running(Plan([ExportPlan("a", image)], [sock], exit_last=True))
    await asyncio.to_thread(lambda: Client(sock).close())
    await asyncio.wait_for(task, 60)
