from nbdserve.admin.commands.table import COMMANDS
from tests.admin.clients import RawClient


def test_queries(client: RawClient) -> None:
    assert client.execute("query-version") == client.greeting["QMP"]["version"]
    assert {each["name"] for each in client.execute("query-commands")} == set(COMMANDS)
    assert {"name": "str", "meta-type": "builtin", "json-type": "string"} in client.execute("query-qmp-schema")
    assert client.execute("query-command-line-options") == []
    assert client.execute("query-command-line-options", option="drive") == "invalid option name: drive"


def test_events_there_are(client: RawClient) -> None:
    assert {"name": "BLOCK_IO_ERROR"} in client.execute("query-events")
    assert {"name": "JOB_STATUS_CHANGE"} in client.execute("query-events")
