"""How users write NBD exports."""

from __future__ import annotations

import pytest

from nbdserve.errors import ConfigError
from nbdserve.storage.nbd_target import NbdTarget, is_nbd, parse_target

WRITTEN = {
    "nbd://host": (NbdTarget("", "host"), "nbd://host"),
    "nbd://host/": (NbdTarget("", "host"), "nbd://host"),
    "nbd://Host:1234/disk": (NbdTarget("disk", "host", 1234), "nbd://host:1234/disk"),
    "nbd+tcp://10.0.0.1/a/b": (NbdTarget("a/b", "10.0.0.1"), "nbd://10.0.0.1/a/b"),
    "nbd://[::1]:1/x": (NbdTarget("x", "::1", 1), "nbd://[::1]:1/x"),
    "nbd://h//disk": (NbdTarget("/disk", "h"), "nbd://h//disk"),
    "nbd://h/a%20b%3f": (NbdTarget("a b?", "h"), "nbd://h/a%20b%3F"),
    "nbd+unix:///?socket=/run/s": (NbdTarget("", socket="/run/s"), "nbd+unix:///?socket=/run/s"),
    "nbd+unix:///d%2520?socket=/a%20b": (NbdTarget("d%20", socket="/a b"), "nbd+unix:///d%2520?socket=/a%20b"),
    "nbd+unix://?socket=rel": (NbdTarget("", socket="rel"), "nbd+unix:///?socket=rel"),
    "nbd+unix:///x?socket=@name": (NbdTarget("x", socket="@name"), "nbd+unix:///x?socket=@name"),
    "nbd:localhost:10809": (NbdTarget("", "localhost"), "nbd://localhost"),
    "nbd:[::1]:1:exportname=a b": (NbdTarget("a b", "::1", 1), "nbd://[::1]:1/a%20b"),
    "nbd:unix:/run/s": (NbdTarget("", socket="/run/s"), "nbd+unix:///?socket=/run/s"),
    "nbd:unix:/run/s:exportname=x:y": (NbdTarget("x:y", socket="/run/s"), "nbd+unix:///x%3Ay?socket=/run/s"),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written(text: str) -> None:
    target, uri = WRITTEN[text]
    assert is_nbd(text)
    assert parse_target(text) == target
    assert target.uri == uri
    assert parse_target(uri) == target


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nbds://host/x", "TLS is not supported yet"),
        ("nbd://", "the host is missing"),
        ("nbd:///x", "the host is missing"),
        ("nbd://h:0/", "port"),
        ("nbd://h:70000/", "port"),
        ("nbd://h/x?socket=/s", "'socket' means nothing"),
        ("nbd://u@h/x", "neither a user"),
        ("nbd://[::1/x", "not a URI"),
        ("nbd+unix:///x", "give the socket"),
        ("nbd+unix:///x?socket=", "give the socket"),
        ("nbd+unix:///x?socket=/s&a=b", "give the socket"),
        ("nbd+unix://h/x?socket=/s", "no host"),
        ("nbd:host", "write nbd://"),
        ("nbd:host:port", "port"),
        ("nbd:unix:", "a host or a unix socket"),
        ("nbd+unix:///x?socket=/" + "s" * 107, "fit a socket address"),
        ("nbd://h/" + "x" * 4097, "at most 4096 bytes"),
        ("nbd://h/%00", "without NUL"),
    ],
)
def test_what_is_refused(text: str, problem: str) -> None:
    assert is_nbd(text)
    with pytest.raises(ConfigError, match=problem) as error:
        parse_target(text)
    assert text in str(error.value)


def test_what_is_no_export() -> None:
    for text in ("nbd", "./nbd:x", "/nbd://x", "json:{}", "file:///nbd://", "nbdx://h", "disk.img"):
        assert not is_nbd(text)
