from tests.admin.clients import RawClient


def test_what_is_no_action(client: RawClient) -> None:
    assert client.execute("transaction", actions=[]) == {}
    assert client.execute("transaction", actions=[{"type": "x"}]) == "Parameter 'type' does not accept value 'x'"
    grouped = {"completion-mode": "grouped"}
    failed = client.execute("transaction", actions=[{"type": "abort", "data": {}}], properties=grouped)
    assert failed == "Transaction aborted using Abort action"
