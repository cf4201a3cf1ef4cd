import io
from typing import Any

from rich.console import Console

from nbdserve.cli.admin.tables import as_table


def text(result: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(as_table(result))
    assert isinstance(console.file, io.StringIO)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines() if line.strip(" ─")]


def test_results() -> None:
    assert text([{"a": 1, "b": {"c": True}}, {"a": "x"}]) == ["a b.c", "1 yes", "x"]
    assert text({"a": [1], "b": {"c": {"d": {"e": 1}}}}) == ["a [1]", 'b.c.d {"e": 1}']
    assert text([]) == ["none"]
    assert text({}) == []
    assert text("x\r\ny\r\n") == ["x", "y"]
    assert text(5) == ["5"]
    many = {f"name{number}": number for number in range(9)}
    assert text([many])[0] == "name0 0"
