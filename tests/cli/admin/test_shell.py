import pytest

from nbdserve.cli.admin.client import AdminClient
from nbdserve.cli.admin.shell import Completer, run_line
from nbdserve.cli.image.common import Output


def test_lines(admin_socket: str, capsys: pytest.CaptureFixture[str]) -> None:
    with AdminClient(admin_socket) as client:
        assert run_line(client, "blockdev-add driver=null-co node-name=n size=512", Output.HUMAN)
        assert run_line(client, "query-named-block-nodes flat=true", Output.JSON)
        assert '"node-name": "n"' in capsys.readouterr().out
        assert run_line(client, "stop # hold", Output.HUMAN)
        assert capsys.readouterr().out == "STOP {}\n"
        for line, problem in (("nope", "not been found"), ("blockdev-del x", "name=value"), ("a 'b", "quotation")):
            assert run_line(client, line, Output.HUMAN)
            assert problem in capsys.readouterr().err
        assert run_line(client, "", Output.HUMAN)
        assert not run_line(client, "exit", Output.HUMAN)


def test_completion(admin_socket: str) -> None:
    with AdminClient(admin_socket) as client:
        completer = Completer(client.execute("query-qmp-schema"))
    assert completer.candidates("block-export-", "block-export-") == ["block-export-add", "block-export-del"]
    assert "exit" in completer.candidates("", "")
    assert completer.candidates("block-export-add wri", "wri") == ["writable="]
    assert "filename=" in completer.candidates("blockdev-add driver=file f", "f")
    assert completer.candidates("nope ", "") == []
