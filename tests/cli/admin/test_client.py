import socket
import threading
from pathlib import Path

import pytest

from nbdserve.admin.control import Control
from nbdserve.admin.events import STOP
from nbdserve.cli.admin.client import ENVIRONMENT, AdminClient, VerbError, address_or_default
from nbdserve.errors import ConfigError


def test_verbs_and_events(admin_socket: str, control: Control) -> None:
    with AdminClient(f"unix:{admin_socket}") as client:
        assert client.version["package"] == "nbdserve test"
        assert client.execute("query-status")["running"] is True
        with pytest.raises(VerbError, match="The command x has not been found; query-commands lists those there are"):
            client.execute("x")
        with pytest.raises(VerbError, match=r"The command query-blok has not been found; did you mean query-block or"):
            client.execute("query-blok")
        with pytest.raises(VerbError, match="Parameter 'node-name' is missing"):
            client.execute("blockdev-del", {})
        client.execute("stop")
        client.execute("cont")
        client.poll()
        assert [event["event"] for event in client.events] == [STOP.name, "RESUME"]


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        AdminClient(str(tmp_path / "absent"))
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            sock, _ = other.accept()
            sock.sendall(b"SSH-2.0-OpenSSH\r\n")
            sock.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match="no admin socket"):
            AdminClient(f"127.0.0.1:{other.getsockname()[1]}")
        thread.join()


def test_which_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "/from/environment")
    assert address_or_default(None) == "/from/environment"
    assert address_or_default("/given") == "/given"
    monkeypatch.delenv(ENVIRONMENT)
    with pytest.raises(ConfigError, match="--socket"):
        address_or_default(None)
