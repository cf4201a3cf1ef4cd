import pytest

from nbdserve.admin.lexer import ERROR, FLOAT, INTEGER, KEYWORD, STRING, Lexer, Token

TEXT = b"""{"a\\"b" : -12,'x\\'' :[0, 1.5e-3,true]}\n5 """
TOKENS = [
    (ord("{"), b"{"), (STRING, b'"a\\"b"'), (ord(":"), b":"), (INTEGER, b"-12"), (ord(","), b","),
    (STRING, b"'x\\''"), (ord(":"), b":"), (ord("["), b"["), (INTEGER, b"0"), (ord(","), b","), (FLOAT, b"1.5e-3"),
    (ord(","), b","), (KEYWORD, b"true"), (ord("]"), b"]"), (ord("}"), b"}"), (INTEGER, b"5"),
]  # fmt: skip


@pytest.mark.parametrize("portion", [1, 2, 3, 1000])
def test_tokens_do_not_depend_on_the_portions(portion: int) -> None:
    lexer = Lexer()
    tokens: list[Token] = []
    for start in range(0, len(TEXT), portion):
        tokens += lexer.feed(TEXT[start : start + portion])
    assert tokens == TOKENS
    assert lexer.pending == 0


def test_what_follows_an_error_is_skipped_up_to_a_new_beginning() -> None:
    assert list(Lexer().feed(b'01 "still lost" x\n"a" ')) == [(ERROR, b"01"), (STRING, b'"a"')]
    assert list(Lexer().feed(b"@}")) == [(ERROR, b"@"), (ord("}"), b"}")]


def test_a_token_begun_is_counted_and_can_be_forgotten() -> None:
    lexer = Lexer()
    assert list(lexer.feed(b'"' + b"x" * 99)) == []
    assert lexer.pending == 100
    lexer.forget()
    assert lexer.pending == 0
    assert list(lexer.feed(b'rest"{')) == [(ord("{"), b"{")]
