import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserve.errors import ConfigError
from nbdserve.server.addresses import TcpAddress, UnixAddress, address_of, parse_address, parse_port, unix_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:10810", TcpAddress("127.0.0.1", 10810)),
        ("127.0.0.1", TcpAddress("127.0.0.1", 10809)),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("*:10809", TcpAddress("*", 10809)),
        ("[::1]:10809", TcpAddress("::1", 10809)),
        ("[::1]", TcpAddress("::1", 10809)),
        ("unix:/run/nbd.sock", UnixAddress("/run/nbd.sock")),
        ("unix:@nbd", UnixAddress("@nbd")),
    ],
)
def test_parse(text: str, address: object) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", ":10809", "host:x", "host:-1", "host:65536", "host:٣", "::1", "[::1", "[::1]10809", "[x]:1", "/run/s", "@a",
     "unix:", "unix:@", "unix:/a\0b", "unix:/" + 107 * "x"],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_address(text)


def test_longest_unix_path() -> None:
    assert unix_address("/" + 106 * "x")
    assert unix_address("@" + 106 * "x")


def test_relative_unix_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert unix_address("s") == UnixAddress(str(tmp_path / "s"))


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_config_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ConfigError:
        return
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("address", "export", "uri"),
    [
        (TcpAddress("127.0.0.1"), "", "nbd://127.0.0.1"),
        (TcpAddress("127.0.0.1", 1), "a", "nbd://127.0.0.1:1/a"),
        (TcpAddress("::1", 1), "/disk", "nbd://[::1]:1//disk"),
        (TcpAddress("0.0.0.0"), "ä b?", "nbd://localhost/%C3%A4%20b%3F"),
        (TcpAddress("*", 1), "", "nbd://localhost:1"),
        (UnixAddress("/run/a b"), "", "nbd+unix:///?socket=/run/a%20b"),
        (UnixAddress("/run/s"), "a&b", "nbd+unix:///a%26b?socket=/run/s"),
        (UnixAddress("@s"), "", "nbd+unix:///?socket=@s"),
    ],
)
def test_uri(address: TcpAddress | UnixAddress, export: str, uri: str) -> None:
    assert address.uri(export) == uri


def test_parse_port() -> None:
    assert parse_port("10809") == 10809
    for text in ("70000", "9" * 5000):
        with pytest.raises(ConfigError, match=f"'{text}'"):
            parse_port(text)


def test_address_of(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        assert address_of(sock) == TcpAddress("127.0.0.1", sock.getsockname()[1])
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        assert address_of(sock) == UnixAddress(str(tmp_path / "s"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("\0nbdserve-test-address-of")
        assert address_of(sock) == UnixAddress("@nbdserve-test-address-of")
