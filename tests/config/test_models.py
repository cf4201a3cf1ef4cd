from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from nbdserve.block.spec import CACHE_MODES, DETECT_ZEROES_MODES, DISCARD_MODES, ImageSpec
from nbdserve.config.models import AdminOptions, Config, ExportOptions, ServerOptions, help_of
from nbdserve.errors import ConfigError
from nbdserve.server.addresses import TcpAddress, UnixAddress
from nbdserve.server.server import ServerLimits


def test_defaults_are_those_of_the_components() -> None:
    assert ExportOptions(path="x").image() == ImageSpec("x")
    assert ServerOptions().addresses() == [TcpAddress("127.0.0.1", 10809)]
    limits, options = ServerLimits(), ServerOptions()
    for name in ServerLimits.__slots__:
        assert getattr(options, name) == getattr(limits, name)


def test_every_option_has_help() -> None:
    for model in (ServerOptions, AdminOptions, ExportOptions):
        for name in model.model_fields:
            assert help_of(model, name).endswith((".", ". Required."))


def test_image() -> None:
    options = ExportOptions(
        path="a", format="qcow2", read_only=True, snapshot="s", cache="none", discard="on", detect_zeroes="unmap",
        backing="none", overlay=True,
    )  # fmt: skip
    assert options.image() == ImageSpec(
        "a", "qcow2", read_only=True, snapshot="s", cache="none", discard="unmap", detect_zeroes="unmap", backing=None,
        overlay=True,
    )  # fmt: skip
    assert ExportOptions(path="a", offset="1M", size="64K").image() == ImageSpec("a", offset=1 << 20, size=1 << 16)
    assert ExportOptions(path='json:{"driver":"raw","file.filename":"a"}').image() == ImageSpec("a", "raw")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ExportOptions(path="json:{").image()


@pytest.mark.parametrize(
    "wrong",
    [{"path": ""}, {"cache": "x"}, {"discard": "x"}, {"detect_zeroes": "unmap"}, {"offset": -1}, {"offset": "1x"},
     {"size": 1 << 63}, {"max_connections": -1}, {"read_only": "yes"}, {"unknown": 1}, {"backing": "b.qcow2"},
     {"unlock_seconds": 0}],
)  # fmt: skip
def test_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ExportOptions.model_validate({"path": "x"} | wrong)


def test_secrets_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_bytes(b"from a file\n")
    monkeypatch.setenv("DISK_SECRET", "from the environment")
    for options, secret in (
        ({"secret_file": str(tmp_path / "key")}, b"from a file\n"),
        ({"secret_env": "DISK_SECRET"}, b"from the environment"),
    ):
        image = ExportOptions.model_validate({"path": "a"} | options).image()
        assert image == ImageSpec("a", secret=secret)
        assert ExportOptions(path="a", unlock_seconds=2, **options).image().unlock_seconds == 2
        assert "from" not in repr(image)
    with pytest.raises(ValidationError, match="exclude each other"):
        ExportOptions(path="a", secret_file="key", secret_env="DISK_SECRET")
    with pytest.raises(ConfigError, match="cannot read the secret"):
        ExportOptions(path="a", secret_file=str(tmp_path / "absent")).image()


def test_every_mode_is_taken() -> None:
    for mode in CACHE_MODES:
        assert ExportOptions.model_validate({"path": "x", "cache": mode}).cache == mode
    for mode in DISCARD_MODES:
        assert ExportOptions.model_validate({"path": "x", "discard": mode}).discard == mode
    for mode in DETECT_ZEROES_MODES:
        assert ExportOptions.model_validate({"path": "x", "discard": "unmap", "detect_zeroes": mode})


def test_paths_are_taken_from_the_directory_of_the_file() -> None:
    document = {
        "server": {"listen": ["unix:s", "unix:@a", "127.0.0.1:1"], "image_roots": ["r", "/abs"], "pid_file": "p"},
        "exports": {"a": {"path": "a.raw"}, "b": {"path": "/b.raw"}, "c": {"path": "json:{}"}},
    }
    config = Config.model_validate(document, context={"directory": "/conf"})
    assert config.server.listen == ["unix:/conf/s", "unix:@a", "127.0.0.1:1"]
    admin = Config.model_validate(
        {"admin": {"listen": ["unix:a", "127.0.0.1:4"]}}, context={"directory": "/conf"}
    ).admin
    assert admin.addresses() == [UnixAddress("/conf/a"), TcpAddress("127.0.0.1", 4)]
    assert config.server.image_roots == ["/conf/r", "/abs"]
    assert config.server.pid_file == "/conf/p"
    assert [options.path for options in config.exports.values()] == ["/conf/a.raw", "/b.raw", "json:{}"]
