from typing import Any

from nbdserve.admin.command import Command
from nbdserve.admin.commands.table import COMMANDS
from nbdserve.admin.events import BLOCK_EXPORT_DELETED, STOP
from nbdserve.admin.introspection import schema_of
from tests.admin.test_schema import Add

REFERENCES = ("arg-type", "ret-type", "element-type")


async def _nothing(control: Any, arguments: Any) -> None: ...


def by_name(entities: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    assert len({entity["name"] for entity in entities}) == len(entities)
    return {entity["name"]: entity for entity in entities}


def test_types_of_a_command() -> None:
    types = by_name(schema_of({"add": Command("add", _nothing, Add)}, [BLOCK_EXPORT_DELETED, STOP]))
    assert types["add"] == {
        "name": "add", "meta-type": "command", "arg-type": "Add", "ret-type": "Nothing", "allow-oob": False,
    }  # fmt: skip
    assert types["Add"]["members"][1] == {"name": "to", "type": "str", "default": None}
    options = types[types["Add"]["members"][0]["type"]]
    assert options["tag"] == "driver"
    assert options["variants"] == [{"case": "file", "type": "File"}, {"case": "raw", "type": "Raw"}]
    raw = {member["name"]: member for member in types["Raw"]["members"]}
    assert raw["file"] == {"name": "file", "type": "BlockdevRef"}
    assert raw["names"]["type"] == "[BlockdevRef]"
    assert types["[BlockdevRef]"]["element-type"] == "BlockdevRef"
    assert types["BlockdevRef"]["members"][0]["type"] == "str"
    assert types["RefOrNull"]["members"] == [{"type": "str"}, {"type": "null"}]
    assert types["File.discard"]["values"] == ["ignore", "unmap"]
    assert types["BLOCK_EXPORT_DELETED"] == {
        "name": "BLOCK_EXPORT_DELETED", "meta-type": "event", "arg-type": "ExportDeleted",
    }  # fmt: skip


def test_every_type_referred_to_is_described() -> None:
    types = by_name(schema_of(COMMANDS))
    for entity in types.values():
        for key in REFERENCES:
            assert entity.get(key, "str") in types
        for member in [*entity.get("members", []), *entity.get("variants", [])]:
            assert member.get("type", "str") in types
    assert {name for name, entity in types.items() if entity["meta-type"] == "command"} == set(COMMANDS)
