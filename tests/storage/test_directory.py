from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbdserve.storage.directory import sync_parent


async def test_the_directory_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    await sync_parent(str(tmp_path / "file"))
    assert synced == [str(tmp_path)]
