from typing import Annotated, Any, Literal

import pytest
from pydantic import Tag

from nbdserve.admin.errors import QmpError
from nbdserve.admin.schema import Arguments, Uint32, alternate, qmp_name, type_word, union, validated


class File(Arguments):
    driver: Literal["file"]
    filename: str
    discard: Literal["ignore", "unmap"] | None = None


class Raw(Arguments):
    driver: Literal["raw"]
    read_only: bool = False
    offset: int | None = None
    granularity: Uint32 = 0
    file: "Ref"
    names: list["Ref"] | None = None
    backing: "RefOrNull" = None


Options = Annotated[Annotated[File, Tag("=file")] | Annotated[Raw, Tag("=raw")], union("driver")]
Ref = Annotated[Annotated[str, Tag("=text")] | Annotated[Options, Tag("=object")], alternate("BlockdevRef")]
RefOrNull = Annotated[Annotated[str, Tag("=text")] | Annotated[None, Tag("=null")], alternate("RefOrNull"), "nullable"]


class Add(Arguments):
    options: Options
    to: str | None = None


Raw.model_rebuild()
Add.model_rebuild()


def problem(arguments: Any) -> str:
    with pytest.raises(QmpError) as caught:
        validated(Add, arguments)
    return str(caught.value)


def raw(**members: Any) -> Any:
    return {"options": {"driver": "raw"} | {name.replace("_", "-"): value for name, value in members.items()}}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "Parameter 'options' is missing"),
        ({"options": 5}, "Invalid parameter type for 'options', expected: object"),
        ({"options": {}}, "Parameter 'options.driver' is missing"),
        ({"options": {"driver": 5}}, "Invalid parameter type for 'options.driver', expected: string"),
        ({"options": {"driver": "zz"}}, "Parameter 'driver' does not accept value 'zz'"),
        (raw(), "Parameter 'options.file' is missing"),
        (raw(file=5), "Invalid parameter type for 'file', expected: BlockdevRef"),
        (raw(file={"driver": "file"}), "Parameter 'options.file.filename' is missing"),
        (raw(file="x", more=1), "Parameter 'options.more' is unexpected"),
        (raw(file="x", read_only="no"), "Invalid parameter type for 'options.read-only', expected: boolean"),
        (raw(file="x", offset=1.5), "Invalid parameter type for 'options.offset', expected: integer"),
        (raw(file="x", offset=True), "Invalid parameter type for 'options.offset', expected: integer"),
        (raw(file="x", offset=None), "Invalid parameter type for 'options.offset', expected: integer"),
        (raw(file="x", granularity=-1), "Parameter 'granularity' expects uint32_t"),
        (raw(file="x", granularity=1 << 32), "Parameter 'granularity' expects uint32_t"),
        (raw(file="x", names={}), "Invalid parameter type for 'options.names', expected: array"),
        (raw(file="x", names=[5]), "Invalid parameter type for 'null', expected: BlockdevRef"),
        (raw(file="x", names=[{}]), "Parameter 'options.names[0].driver' is missing"),
        (raw(file="x", backing=5), "Invalid parameter type for 'backing', expected: RefOrNull"),
        (
            raw(file={"driver": "file", "filename": "a", "discard": "x"}),
            "Parameter 'discard' does not accept value 'x'",
        ),
        (
            raw(file={"driver": "file", "filename": "a", "discard": 1}),
            "Invalid parameter type for 'options.file.discard', expected: string",
        ),
        (
            raw(file={"driver": "file", "filename": None}),
            "Invalid parameter type for 'options.file.filename', expected: string",
        ),
    ],
)
def test_mistakes_are_told_in_qemus_words(arguments: Any, text: str) -> None:
    assert problem(arguments) == text


def test_the_first_mistake_is_told() -> None:
    assert problem({"to": 5}) == "Parameter 'options' is missing"
    assert problem({"x": 5, "to": 5} | raw(file="f")) == "Invalid parameter type for 'to', expected: string"


def test_what_is_right() -> None:
    options = validated(Add, raw(read_only=True, file={"driver": "file", "filename": "a"}, backing=None)).options
    assert isinstance(options, Raw)
    assert options.read_only
    assert options.file == File(driver="file", filename="a")


def test_names() -> None:
    assert [qmp_name(name) for name in ("node_name", "from_", "id")] == ["node-name", "from", "id"]


def test_type_words() -> None:
    words = [type_word(each) for each in (str, int | None, list[str], Literal["a"], float, bool, File, Options, Ref)]
    assert words == ["string", "integer", "array", "string", "number", "boolean", "object", "object", "BlockdevRef"]
