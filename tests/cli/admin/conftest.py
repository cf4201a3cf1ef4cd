"""The admin server of ``tests/admin``."""

from tests.admin.conftest import admin_socket, control, images

__all__ = ["admin_socket", "control", "images"]
