import pytest

from nbdserve.cli.admin.arguments import parse_arguments
from nbdserve.errors import ConfigError


def test_values_are_json_or_text() -> None:
    words = ["a=x y", "b=5", "c=true", 'd=["x"]', "e=", "file.driver=file", "file.filename=/a=b", '{"g": {"h": 1}}']
    assert parse_arguments(words) == {
        "a": "x y", "b": 5, "c": True, "d": ["x"], "e": "", "file": {"driver": "file", "filename": "/a=b"},
        "g": {"h": 1},
    }  # fmt: skip


@pytest.mark.parametrize("words", [["a"], ["=b"], ["a=1", "a=2"], ["a=1", "a.b=2"], ["{"]])
def test_mistakes(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"'[a{=]"):
        parse_arguments(words)
