import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserve.admin import codec
from nbdserve.admin.codec import Broken, JsonError, JsonStream, encode, parse
from nbdserve.admin.lexer import Lexer
from tests.admin.broken_input import INPUTS, LACKS, OBJECT

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(st.characters(max_codepoint=0xD7FF)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=4),
    max_leaves=12,
)


def problems(values: list[Any]) -> list[str]:
    return [
        value.problem if isinstance(value, Broken) else LACKS if isinstance(value, dict) else OBJECT for value in values
    ]


@pytest.mark.parametrize("data", INPUTS, ids=lambda data: repr(data[:24]))
@pytest.mark.parametrize("portion", [1, 1 << 20])
def test_broken_json_is_told_as_qemu_tells_it(data: bytes, portion: int) -> None:
    stream = JsonStream()
    values: list[Any] = []
    for start in range(0, len(data), portion):
        values += stream.feed(data[start : start + portion])
    assert problems(values) == INPUTS[data]
    assert list(stream.feed(b' {"end":1}')) == [{"end": 1}]


@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, max_size=3), st.randoms())
def test_values_back_to_back_in_any_portions(values: list[Any], rng: random.Random) -> None:
    data = b"".join(json.dumps(value, ensure_ascii=rng.random() < 0.5).encode() + b" " for value in values)
    stream = JsonStream()
    got: list[Any] = []
    position = 0
    while position < len(data):
        step = rng.randint(1, 9)
        got += stream.feed(data[position : position + step])
        position += step
    assert got == values


def test_numbers() -> None:
    text = b"[18446744073709551615, 18446744073709551616, -9223372036854775809, -0, 1e2, " + b"9" * 5000 + b"]"
    (values,) = JsonStream().feed(text)
    assert values == [(1 << 64) - 1, float(1 << 64), -float(1 << 63), 0, 100.0, float("inf")]
    assert [type(value) for value in values] == [int, float, float, int, float, float]


def test_strings() -> None:
    (values,) = JsonStream().feed(rb"""["\u00e4\ud83d\ude00\n", 'a"\'', "\\\"", "%s"]""")
    assert values == ["ä\U0001f600\n", "a\"'", '\\"', "%s"]


def test_one_request_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_VALUE_BYTES", 1000)
    monkeypatch.setattr(codec, "MAX_TOKENS", 50)
    stream = JsonStream()
    too_long = Broken("JSON token size limit exceeded")
    assert list(stream.feed(b'{"execute":"' + b"x" * 1000)) == [too_long]
    assert list(stream.feed(b'x" }{"a":1}'))[-1] == {"a": 1}
    assert next(iter(stream.feed(b'["' + b"x" * 600 + b'","' + b"x" * 600 + b'"]'))) == too_long
    assert next(iter(JsonStream().feed(b"[" + b"1," * 40 + b"1]"))) == Broken("JSON token count limit exceeded")


def test_a_line_of_10_mb_is_a_request() -> None:
    stream = JsonStream()
    data = b'{"execute":"' + b"x" * 10_000_000 + b'"}'
    values: list[Any] = []
    for start in range(0, len(data), 1 << 16):
        values += stream.feed(data[start : start + (1 << 16)])
    assert len(values[0]["execute"]) == 10_000_000


def test_tokens_that_end_too_early() -> None:
    with pytest.raises(JsonError, match="premature EOI"):
        parse(list(Lexer().feed(b'{"a":')))


def test_encode() -> None:
    assert encode({"return": {}, "id": "ä\n"}) == b'{"return": {}, "id": "\\u00e4\\n"}\r\n'
