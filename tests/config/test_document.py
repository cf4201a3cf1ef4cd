import re
import tomllib
from pathlib import Path

from nbdserve.config.document import render
from nbdserve.config.models import AdminOptions, Config, ExportOptions, ServerOptions

SHIPPED = Path(__file__).parents[2] / "config" / "nbdserve.toml"


def test_shipped_file_is_what_the_code_says() -> None:
    assert SHIPPED.read_text(encoding="utf-8") == render()


def test_as_shipped_it_changes_nothing() -> None:
    assert Config.model_validate(tomllib.loads(render())) == Config()


def test_every_option_is_there_at_its_default() -> None:
    config = tomllib.loads(re.sub(r"^#(?=\S)", "", render(), flags=re.MULTILINE))
    assert list(config["server"]) == list(ServerOptions.model_fields)
    assert Config.model_validate(config).server == ServerOptions()
    assert list(config["admin"]) == list(AdminOptions.model_fields)
    assert Config.model_validate(config).admin == AdminOptions()
    shown = config["exports"]["NAME"]
    assert list(shown) == list(ExportOptions.model_fields)
    for name, field in ExportOptions.model_fields.items():
        assert shown[name] == (field.examples[0] if field.examples else field.default)
