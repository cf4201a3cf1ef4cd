import logging
from typing import Any

import pytest

from nbdserve.admin.codec import Broken
from nbdserve.admin.command import Command
from nbdserve.admin.commands.table import COMMANDS
from nbdserve.admin.control import Control
from nbdserve.admin.session import Session
from nbdserve.errors import ImageError


@pytest.fixture
def session(control: Control) -> Session:
    return Session(control, COMMANDS, "admin uid=7 pid=8")


async def test_greeting_and_negotiation(session: Session) -> None:
    greeting = session.greeting()["QMP"]
    assert greeting["version"]["qemu"]["major"] == 7
    assert greeting["capabilities"] == []
    early = "Expecting capabilities negotiation with 'qmp_capabilities'"
    for name in ("query-version", "nope"):
        answer = await session.answer({"execute": name, "id": 5})
        assert answer == {"id": 5, "error": {"class": "CommandNotFound", "desc": early}}
    answer = await session.answer({"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}})
    assert answer["error"]["desc"] == "Parameter 'null' does not accept value 'x'"
    answer = await session.answer({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
    assert answer["error"]["desc"] == "Capability oob not available"
    assert not session.negotiated
    assert await session.answer({"execute": "qmp_capabilities", "id": None}) == {"return": {}, "id": None}
    assert session.negotiated
    assert (await session.answer({"execute": "qmp_capabilities"}))["error"]["class"] == "CommandNotFound"


async def test_an_id_is_echoed_where_it_can_be_read(session: Session) -> None:
    await session.answer({"execute": "qmp_capabilities"})
    assert "id" not in await session.answer({"execute": "query-version"})
    assert (await session.answer({"execute": "query-version", "id": [1, {}]}))["id"] == [1, {}]
    assert (await session.answer({"id": 0}))["id"] == 0
    assert (await session.answer(Broken("JSON parse error, x")))["error"]["desc"] == "JSON parse error, x"


async def test_failures_of_commands(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    failures: list[Exception] = []

    async def fail(control: Any, arguments: Any) -> None:
        raise failures[-1]

    session = Session(control, COMMANDS | {"fail": Command("fail", fail)}, "admin uid=7 pid=8")
    await session.answer({"execute": "qmp_capabilities"})
    caplog.set_level(logging.INFO)
    for failure, text in (
        (ImageError("/a", "is broken"), "/a: is broken"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ZeroDivisionError("oops"), "fail: internal error: ZeroDivisionError"),
    ):
        failures.append(failure)
        error = {"class": "GenericError", "desc": text}
        assert await session.answer({"execute": "fail", "id": 1}) == {"id": 1, "error": error}
    await session.answer({"execute": "query-version"})
    assert "admin uid=7 pid=8: fail: failed: /a: is broken" in caplog.messages
    assert caplog.messages[-1] == "admin uid=7 pid=8: query-version: done"
