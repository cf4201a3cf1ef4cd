import asyncio
import logging
from pathlib import Path

from nbdserve.admin.start import Admin, log
from nbdserve.server.addresses import UnixAddress
from tests.admin.clients import RawClient
from tests.admin.conftest import new_control


async def test_up_and_down(tmp_path: Path) -> None:
    path = tmp_path / "s"
    admin = Admin([UnixAddress(str(path))])
    level = log.level
    await admin.start(new_control())
    assert log.isEnabledFor(logging.INFO), "who did what is written down"
    log.setLevel(level)
    client = await asyncio.to_thread(RawClient, str(path))
    client.close()
    await admin.close()
    await admin.close()
    admin.release()
    admin.release()
    assert not path.exists()
