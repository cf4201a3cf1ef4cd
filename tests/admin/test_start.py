import asyncio
import logging
from pathlib import Path

import pytest

from nbdserve.admin.start import Admin, _log_to_stderr, log
from nbdserve.server.addresses import UnixAddress
from tests.admin.clients import RawClient
from tests.admin.conftest import new_control


async def test_up_and_down(tmp_path: Path) -> None:
    path = tmp_path / "s"
    admin = Admin([UnixAddress(str(path))])
    await admin.start(new_control())
    client = await asyncio.to_thread(RawClient, str(path))
    client.close()
    await admin.close()
    await admin.close()
    admin.release()
    admin.release()
    assert not path.exists()


def test_what_is_done_is_written_down_where_nobody_set_up_logging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", False)
    before = log.level
    _log_to_stderr()
    logging.getLogger("nbdserve.admin.session").info("admin uid=1: query-version: done")
    log.setLevel(before)
    assert "admin uid=1: query-version: done" in capsys.readouterr().err
