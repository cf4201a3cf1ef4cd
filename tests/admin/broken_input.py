"""Requests that are wrong, and what QEMU 7.2's monitor answers to each."""

from __future__ import annotations

OBJECT = "QMP input must be a JSON object"
LACKS = "QMP input lacks member 'execute'"


def _parse(problem: str) -> str:
    return f"JSON parse error, {problem}"


VALUE = _parse("expecting value")

INPUTS: dict[bytes, list[str]] = {
    b'{"a" 1}': [_parse("missing : in object pair")],
    b'{"a",1}': [_parse("missing : in object pair")],
    b"{5:1}": [_parse("key is not a string in object")],
    b"{{}:1}": [_parse("key is not a string in object")],
    b'{"a":1 "b":2}': [_parse("expected separator in dict")],
    b'{"a":1]': [_parse("expected separator in dict")],
    b"[1 2]": [_parse("expected separator in list")],
    b"[1}": [_parse("expected separator in list")],
    b"[12a]": [_parse("expected separator in list")],
    b'{"a":}': [VALUE],
    b'{"a":1,}': [VALUE],
    b"{,}": [VALUE],
    b"{:}": [VALUE],
    b"{]": [VALUE],
    b"[}": [VALUE],
    b"[{]}": [VALUE],
    b"}": [VALUE],
    b"[1,]": [VALUE],
    b"[]]": [OBJECT, VALUE],
    b'{"a":{"b":1,"b":2}}': [_parse("duplicate key")],
    b"[a1]": [_parse("invalid keyword 'a'")],
    b"foo}": [_parse("invalid keyword 'foo'"), VALUE],
    b"[nul]": [_parse("invalid keyword 'nul'")],
    b"true ": [OBJECT],
    b"1 ": [OBJECT],
    b'5"abc"': [OBJECT, OBJECT],
    b"[True]": [_parse("stray 'T'"), VALUE],
    b"[1.]": [_parse("stray '1.]'")],
    b"[-]": [_parse("stray '-]'")],
    b"[1e]": [_parse("stray '1e]'")],
    b"[1.5.6]": [_parse("stray '.'"), VALUE],
    b"[0e1]": [_parse("expected separator in list")],
    b"[-0E1]": [_parse("stray 'E'"), VALUE],
    b"[0.5e1]": [OBJECT],
    b"[+1]": [_parse("stray '+'"), VALUE],
    b"[-01]": [_parse("stray '-01'"), VALUE],
    b"[-1.5e+3, 0, 0.5]": [OBJECT],
    b"- {}": [_parse("stray '- '"), LACKS],
    b"[\\]": [_parse("stray '\\'"), VALUE],
    b"[\x7f]": [_parse("stray '\x7f'"), VALUE],
    b'["a\tb"]': [_parse("stray '\"a\t'"), VALUE],
    b'"a\x00b"\n': [_parse("stray '\"a'")],
    b'["\\\n"]': [_parse("stray '\"\\\n'"), VALUE],
    b"{}\x00{}": [LACKS, _parse("stray ''"), LACKS],
    b"\xff\xfe{}": [_parse("stray '\ufffd'"), _parse("stray '\ufffd'"), LACKS],
    b'["\xff"]': [_parse("stray '\"\ufffd'"), VALUE],
    b"Abc def{}": [_parse("stray 'A'"), LACKS],
    b'["\xc3\xa4\xc0\x80"]': [OBJECT],
    b'"\xed\xa0\x80\xc0\x80\xef\xbf\xbf\xed\xa0\n': [_parse("stray '\"\ufffd\x00\ufffd\ufffd\n'")],
    rb'["\u12' b'\xc3"]': [_parse('\\u12\ufffd" is not a valid Unicode character')],
    rb'["\ud800' b'\xc3"]': [_parse("\\ud800 is not a valid Unicode character")],
    b'["\xc3"]': [_parse("invalid UTF-8 sequence in string")],
    b'["\xed\xa0\x80"]': [_parse("invalid UTF-8 sequence in string")],
    b'"\xef\xbf\xbf" ': [_parse("invalid UTF-8 sequence in string")],
    rb'["a\x"]': [_parse("invalid escape sequence in string")],
    rb'["\u12"]': [_parse('\\u12" is not a valid Unicode character')],
    rb'["\uZZZZ"]': [_parse("\\uZZZZ is not a valid Unicode character")],
    rb'["\ud800\u0041"]': [_parse("\\ud800 is not a valid Unicode character")],
    rb'["\udc00"]': [_parse("\\udc00 is not a valid Unicode character")],
    rb'["\uffff"]': [_parse("\\uffff is not a valid Unicode character")],
    rb'["\ud800\udc00\/\b\u0000"]': [OBJECT],
    b"['it\\'s \"']": [OBJECT],
    b"[" * 1026 + b"]" * 1026: ["JSON nesting depth limit exceeded", OBJECT, *[VALUE] * 1025],
}
"""Broken JSON, and JSON that is no request: the descriptions of the errors, in their order."""

REQUESTS: dict[bytes, str | None] = {
    b'{"execute":5}': "QMP input member 'execute' must be a string",
    b'{"execute":null,"id":5}': "QMP input member 'execute' must be a string",
    b'{"execute":"query-version","foo":1}': "QMP input member 'foo' is unexpected",
    b'{"exec-oob":"query-version","id":1}': "QMP input member 'exec-oob' is unexpected",
    b'{"execute":"query-version","arguments":5}': "QMP input member 'arguments' must be an object",
    b'{"execute":"query-version","arguments":null}': "QMP input member 'arguments' must be an object",
    b'{"arguments":{}}': LACKS,
    b'{"id":[1,{"a":null}]}': LACKS,
    b'{"execute":"","id":""}': "The command  has not been found",
    b'{"execute":"no-such-command","id":null}': "The command no-such-command has not been found",
    b'{"execute":"qmp_capabilities","id":1}': "Capabilities negotiation is already complete, command ignored",
    b'{"execute":"query-version","arguments":{"x":1},"id":18446744073709551615}': "Parameter 'x' is unexpected",
    b'{"execute":"query-commands","id":1.5}': None,
    b"{'execute':'query-version','id':'a\"b'}": None,
    '{"execute":"query-version","id":"\\u00e4ö"}'.encode(): None,
}
"""Whole requests of a client that has negotiated: the description of the error, or None."""
