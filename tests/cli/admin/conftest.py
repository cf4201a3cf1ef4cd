"""The admin server of ``tests/admin``."""

from tests.admin.commands.conftest import images
from tests.admin.conftest import admin_socket, control

__all__ = ["admin_socket", "control", "images"]
