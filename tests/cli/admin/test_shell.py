import socket

import pytest

from nbdserve.admin.codec import JsonStream
from nbdserve.cli.admin.client import AdminClient, GoneError
from nbdserve.cli.admin.shell import Schema, run_line
from nbdserve.cli.output import Output


def test_lines(admin_socket: str, capsys: pytest.CaptureFixture[str]) -> None:
    with AdminClient(admin_socket) as client:
        schema = Schema(client.execute("query-qmp-schema"))
        assert run_line(client, schema, "blockdev-add driver=null-co node-name=n size=512", Output.HUMAN)
        assert run_line(client, schema, "query-named-block-nodes flat=true", Output.JSON)
        assert '"node-name": "n"' in capsys.readouterr().out
        assert run_line(client, schema, "stop # hold", Output.HUMAN)
        assert capsys.readouterr().out == "STOP {}\n"
        for line, problem in (("nope", "not been found"), ("blockdev-del x", "name=value"), ("a 'b", "quotation")):
            assert run_line(client, schema, line, Output.HUMAN)
            assert problem in capsys.readouterr().err
        assert run_line(client, schema, "status", Output.HUMAN)
        assert "nbdserve test, up" in capsys.readouterr().out
        assert run_line(client, schema, "", Output.HUMAN)
        assert not run_line(client, schema, "exit", Output.HUMAN)


def test_completion(admin_socket: str) -> None:
    with AdminClient(admin_socket) as client:
        completer = Schema(client.execute("query-qmp-schema"))
    assert completer.candidates("block-export-", "block-export-") == [
        "block-export-add ",
        "block-export-del ",
    ]
    assert {"exit ", "help ", "status "} <= set(completer.candidates("", ""))
    assert completer.candidates("block-export-add wri", "wri") == ["writable="]
    assert "filename=" in completer.candidates("blockdev-add driver=file f", "f")
    assert completer.candidates("nope ", "") == []
    assert completer.candidates("help query-na", "query-na") == ["query-name", "query-named-block-nodes"]


def test_help(admin_socket: str, capsys: pytest.CaptureFixture[str]) -> None:
    with AdminClient(admin_socket) as client:
        schema = Schema(client.execute("query-qmp-schema"))
        for line in ("help", "?"):
            assert run_line(client, schema, line, Output.HUMAN)
            text = capsys.readouterr().out
            assert "VERB name=value" in text
            assert "query-named-block-nodes" in text
        for line in ("help block-export-del", "block-export-del --help"):
            assert run_line(client, schema, line, Output.HUMAN)
            lines = capsys.readouterr().out.splitlines()
            assert lines == ["block-export-del", "  id    str", "  mode  [safe | hide | soft | hard]"]
        assert run_line(client, schema, "help query-name", Output.HUMAN)
        assert capsys.readouterr().out == "query-name\n  no arguments\n"
        assert run_line(client, schema, "help nope", Output.HUMAN)
        assert "nope has not been found" in capsys.readouterr().err


def test_a_server_that_is_gone() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    client = AdminClient.__new__(AdminClient)
    client._sock, client._stream, client._waiting, client.events = ours, JsonStream(), [], []
    with ours:
        for line in ("query-name", ""):
            with pytest.raises(GoneError, match="the server is gone"):
                run_line(client, Schema([]), line, Output.HUMAN)
