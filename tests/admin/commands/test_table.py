from nbdserve.admin.commands.table import COMMANDS


def test_names() -> None:
    assert all(command.name == name for name, command in COMMANDS.items())
    assert "qmp_capabilities" in COMMANDS
