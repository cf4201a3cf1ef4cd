from pathlib import Path

import pytest

from nbdserve.admin.errors import QmpError
from nbdserve.admin.paths import PathPolicy


async def test_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").touch()
    policy = PathPolicy([root, root])
    assert policy.roots == [root]
    assert await policy.check(str(root / "a")) == str(root / "a")
    assert await policy.check(str(root / "new"), exists=False) == str(root / "new")
    monkeypatch.chdir(root)
    assert await policy.check("a") == str(root / "a")
    for path, problem in (
        (str(root / "new"), "No such file"), (str(root), "Is a directory"), ("", "empty"), ("a\0", "NUL"),
        (str(tmp_path / "x"), "outside the image roots"), (f"{root}/../x", "outside"), (f"{root}x/a", "outside"),
    ):  # fmt: skip
        with pytest.raises(QmpError, match=problem):
            await policy.check(path)
