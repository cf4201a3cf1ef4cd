"""Where passphrases come from, and that none is taken from, or repeated on, a command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdserve.config.secrets import (
    MAX_SECRET_BYTES,
    chosen_secret,
    named_secret,
    secret_from_environment,
    secret_from_file,
    secrets_of_objects,
)
from nbdserve.errors import ConfigError


def test_every_byte_of_a_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "key"
    for secret in (b"x", b"pass phrase\n", bytes(range(256)), b"y" * MAX_SECRET_BYTES):
        path.write_bytes(secret)
        assert secret_from_file(str(path)) == secret


def test_a_pipe_is_read_as_well() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"through a pipe")
    os.close(writing)
    try:
        assert secret_from_file(f"/dev/fd/{reading}") == b"through a pipe"
    finally:
        os.close(reading)


@pytest.mark.parametrize("name", ["absent", ".", "empty", "long"])
def test_a_file_that_holds_no_secret_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "long").write_bytes(b"z" * (MAX_SECRET_BYTES + 1))
    with pytest.raises(ConfigError, match=str(tmp_path / name)):
        secret_from_file(str(tmp_path / name))


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match="/dev/zero: a secret has at most"):
        secret_from_file("/dev/zero")


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISK_SECRET", "p\udcffq")
    assert secret_from_environment("DISK_SECRET") == b"p\xffq"
    monkeypatch.setenv("DISK_SECRET", "")
    with pytest.raises(ConfigError, match="empty"):
        secret_from_environment("DISK_SECRET")
    monkeypatch.delenv("DISK_SECRET")
    with pytest.raises(ConfigError, match=r"'DISK_SECRET'.*not set"):
        secret_from_environment("DISK_SECRET")


def test_one_source_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_bytes(b"file")
    monkeypatch.setenv("DISK_SECRET", "environment")
    assert chosen_secret(str(tmp_path / "key"), None) == b"file"
    assert chosen_secret("", "DISK_SECRET") == b"environment"
    assert chosen_secret(None, "") is None
    with pytest.raises(ConfigError, match="both"):
        chosen_secret(str(tmp_path / "key"), "DISK_SECRET")


def test_objects_as_qemu_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a,b").write_bytes(b"first")
    (tmp_path / "c").write_bytes(b"c2Vj\nb25k\n")
    monkeypatch.setenv("DISK_SECRET", "third")
    objects = [
        f"secret,id=s0,file={tmp_path}/a,,b",
        f"qom-type=secret,file={tmp_path}/c,format=base64,id=s1",
        "secret,id=s2,env=DISK_SECRET,format=raw",
        f'{{"qom-type": "secret", "id": "s3", "file": "{tmp_path}/c"}}',
    ]
    secrets = secrets_of_objects(objects)
    assert secrets == {"s0": b"first", "s1": b"second", "s2": b"third", "s3": b"c2Vj\nb25k\n"}
    assert named_secret(secrets, "s1", "encrypt.key-secret") == b"second"
    for name in ("s9", None, 1):
        with pytest.raises(ConfigError, match=r"'encrypt.key-secret'.*no secret of the id"):
            named_secret(secrets, name, "encrypt.key-secret")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("secret,id=s,data=hush", "every user"),
        ("secret,data=hush", "every user"),
        ('{"qom-type":"secret","id":"s","data":"hush"}', "every user"),
        ("secret,id=s,file=KEY,keyid=master", "keyid"),
        ("secret,id=s,file=KEY,iv=AAAA", "iv"),
        ("secret,file=KEY", "id= is missing"),
        ("secret,id=s", "file= is missing"),
        ("secret,id=s,file=KEY,env=HOME", "both"),
        ("secret,id=s,file=KEY,format=hex", "format=hex"),
        ("secret,id=s,file=KEY,format=base64", "base64"),
        ("secret,id=s,file=KEY,colour=red", "'colour'"),
        ("secret,id=s,id=t,file=KEY", "twice"),
        ("secret,id", "no property=value"),
        ("{", "JSON"),
        pytest.param('{"a":' + "[" * 100_000, "nested too deeply", id="nested"),
        ('{"id": "s"}', "not supported"),
        ("tls-creds-x509,id=t,dir=/x", "TLS is not supported"),
        ("iothread,id=t", "'iothread'"),
        ("", "not supported"),
    ],
)
def test_what_is_no_secret_to_be_had_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "key").write_bytes(b"not base 64!")
    with pytest.raises(ConfigError, match=problem) as caught:
        secrets_of_objects([text.replace("KEY", str(tmp_path / "key"))])
    assert "hush" not in str(caught.value)


def test_an_id_is_given_once(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"k")
    with pytest.raises(ConfigError, match="already"):
        secrets_of_objects([f"secret,id=s,file={tmp_path}/key"] * 2)
