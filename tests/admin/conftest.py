"""An admin server on a unix socket, in the test's process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdserve.admin.commands.table import COMMANDS
from nbdserve.admin.control import Control
from nbdserve.admin.server import AdminServer, bind_admin
from nbdserve.config.secrets import secret_of_object
from nbdserve.exports.export import ExportTable
from nbdserve.server.addresses import UnixAddress
from nbdserve.server.server import Server
from tests.admin.clients import RawClient
from tests.admin.images import make_images


def new_control(stop: Callable[[], None] = lambda: None) -> Control:
    """Of a server without clients."""
    return Control("nbdserve test", stop, Server(ExportTable()), COMMANDS, secret_of_object)


@pytest.fixture
def control() -> Control:
    return new_control()


@pytest.fixture
def admin_socket(tmp_path: Path, control: Control) -> Iterator[str]:
    """The path of the socket; the server has a thread of its own, so that tests may block."""
    address = UnixAddress(str(tmp_path / "admin.sock"))
    control.private_paths.add(tmp_path)
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    end: asyncio.Future[None] = loop.create_future()

    async def serve() -> None:
        (listener,) = bind_admin([address])
        server = AdminServer(control, COMMANDS)
        await server.listen(listener)
        ready.set()
        await end
        await server.close()
        listener.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(60)
    yield address.path
    loop.call_soon_threadsafe(lambda: end.done() or end.set_result(None))
    thread.join(60)
    assert not thread.is_alive()
    loop.close()


@pytest.fixture
def client(admin_socket: str) -> Iterator[RawClient]:
    """One that has negotiated."""
    client = RawClient(admin_socket).negotiate()
    yield client
    client.close()


@pytest.fixture
def images(tmp_path: Path, control: Control) -> Path:
    """The directory of the images of ``images.py``, an image root."""
    directory = tmp_path / "images"
    directory.mkdir()
    make_images(directory)
    control.paths.add(directory)
    return directory
