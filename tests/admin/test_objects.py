import pytest

from nbdserve.admin.errors import QmpError
from nbdserve.admin.objects import ObjectEntry, ObjectTable, ThrottleGroupEntry
from nbdserve.block.filters.throttle import Limit


def test_what_is_in_use_stays() -> None:
    table = ObjectTable()
    entry = ObjectEntry("g", "throttle-group", users=["node 'x'"])
    table.add(entry)
    assert table.find("g") is entry
    assert table.find("g", "secret") is None
    with pytest.raises(QmpError, match="in use"):
        table.remove("g")
    entry.users.clear()
    table.remove("g")
    assert list(table) == []


def test_the_limits_of_a_group_can_be_set() -> None:
    group = ThrottleGroupEntry("g")
    group.set("limits", {"iops-read": 5})
    assert group.throttle.limits.iops_read == Limit(5)
    assert group.shown()["limits"]["iops-read"] == 5
    with pytest.raises(QmpError, match=r"Parameter 'limits.x' is unexpected"):
        group.set("limits", {"x": 5})
    with pytest.raises(QmpError, match=r"'throttle-group.type' is not writable"):
        group.set("type", 5)
    with pytest.raises(QmpError, match=r"'throttle-group.x' not found"):
        group.set("x", 5)
