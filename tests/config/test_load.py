from pathlib import Path

import pytest

from nbdserve.config.load import load
from nbdserve.config.models import Config
from nbdserve.errors import ConfigError


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "nbdserve.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_load(tmp_path: Path) -> None:
    path = write(
        tmp_path, '[server]\nlisten = ["unix:s"]\n[exports.disk]\npath = "d.qcow2"\nformat = "qcow2"\nsize = "1G"'
    )
    config = load(path)
    assert config.server.listen == [f"unix:{tmp_path}/s"]
    assert config.exports["disk"].path == str(tmp_path / "d.qcow2")
    assert config.exports["disk"].size == 1 << 30


def test_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")) == Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nlisen = []", r"\[server\] lisen: unknown option; did you mean 'listen'\?"),
        (
            "[exports.d]\npath = 'x'\nred_only = true",
            r"\[exports\.d\] red_only: unknown option; did you mean 'read_only'",
        ),
        ("[sever]\nx = 1", r"sever: unknown table; did you mean 'server'"),
        ("[exports.d]\nformat = 'raw'", r"\[exports\.d\] path: missing"),
        ("[server]\nlisten = ['x:y']", r"\[server\] listen = 'x:y': port 'y'"),
        ("[server]\nlisten = 5", r"\[server\] listen = 5: "),
        ("[server]\ndrain_seconds = -1", r"\[server\] drain_seconds = -1: "),
        ("[exports.d]\npath = 'x'\ndetect_zeroes = 'unmap'", r"\[exports\.d\] detect_zeroes = \"unmap\" needs discard"),
        ("[exports.d]\npath = 'x'\ncache = 'fast'", r"\[exports\.d\] cache = 'fast': .*'writeback'"),
        ("exports = 5", r"exports = 5: a table is expected, \[exports\]$"),
        ("[exports]\nd = 'x'", r"\[exports\] d = 'x': a table is expected, \[exports\.d\]$"),
        ("[server", "not valid TOML"),
        pytest.param("a=" + "[" * 3000, "not valid TOML: nested too deeply", id="nested"),
    ],
)
def test_mistakes_name_file_table_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, "[server]\na = 1\nb = 2"))
    assert len(str(caught.value).splitlines()) == 2


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(str(tmp_path / "absent.toml"))
    (tmp_path / "latin1.toml").write_bytes(b"\xe4 = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(str(tmp_path / "latin1.toml"))
