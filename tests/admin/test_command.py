from nbdserve.admin.command import as_json
from nbdserve.admin.schema import Result


class Node(Result):
    node_name: str
    size: int | None = None


def test_results_as_json() -> None:
    assert as_json(None) == {}
    assert as_json(Node(node_name="a")) == {"node-name": "a"}
    assert as_json([Node(node_name="a", size=0), "x"]) == [{"node-name": "a", "size": 0}, "x"]
