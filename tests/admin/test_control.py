from functools import partial
from typing import Any

from tests.admin.conftest import new_control


def test_clients_are_told_why_the_server_ends() -> None:
    for asked, reason in ((True, "host-qmp-quit"), (False, "host-signal")):
        stops: list[None] = []
        told: list[Any] = []
        control = new_control(partial(stops.append, None))
        control.events.subscribe(told.append)
        if asked:
            control.quit()
        control.announce_end()
        assert len(stops) == asked
        assert told[0]["data"] == {"guest": False, "reason": reason}


def test_the_version_is_one_whose_ways_clients_know() -> None:
    version = new_control().version
    assert (version.qemu.major, version.qemu.minor) == (7, 2)
    assert version.package == "nbdserve test"
