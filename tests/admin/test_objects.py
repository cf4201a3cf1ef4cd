import pytest

from nbdserve.admin.errors import QmpError
from nbdserve.admin.objects import ObjectEntry, ObjectTable


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
