"""Encrypted images through QEMU's tools, for the tests of luks and qcow2."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from tests.support import images

SECRET = b"pass word"
QUICK = "iter-time=10"
LUKS = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
AES = "encrypt.format=aes,encrypt.key-secret=s"


class Stock:
    """qemu-img and qemu-io with the secret ``s``, in one directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        key = folder / "key"
        key.write_bytes(SECRET)
        self.secret = ["--object", f"secret,id=s,file={key}"]

    def create(self, name: str, fmt: str, options: str, size: int | str, *more: str) -> Path:
        """An empty image."""
        path = self.folder / name
        if more or "data_file" in options:
            self._create(path, fmt, options, size, *more)
        else:
            path.write_bytes(_empty(fmt, options, str(size)))
        return path

    def _create(self, path: Path, fmt: str, options: str, size: int | str, *more: str) -> None:
        images.run(
            "qemu-img", "create", "-q", *self.secret, "-f", fmt, "-o", options, *more, path, str(size), cwd=self.folder
        )

    def fill(self, path: Path, fmt: str, content: bytes, method: str = "luks") -> Path:
        """Let ``content`` be what the guest sees."""
        source = self.folder / "source.raw"
        source.write_bytes(content)
        target = self.options(path, fmt, method)
        words = ["-f", "raw", "--target-image-opts", source, target]
        images.run("qemu-img", "convert", "-n", *self.secret, *words, cwd=self.folder)
        source.unlink()
        return path

    @staticmethod
    def options(path: Path, fmt: str, method: str = "luks") -> str:
        """As after ``--image-opts``."""
        key = "key-secret=s" if fmt == "luks" else f"encrypt.format={method},encrypt.key-secret=s"
        return f"driver={fmt},{key},file.filename={path}"

    def io(self, path: Path, fmt: str, *commands: str, method: str = "luks") -> str:
        """qemu-io commands, each of which must succeed and verify."""
        words = [word for command in commands for word in ("-c", command)]
        out = images.run(
            "qemu-io", *self.secret, *words, "--image-opts", self.options(path, fmt, method), cwd=self.folder
        )
        assert "failed" not in out, out
        return out

    def content(self, path: Path, fmt: str, method: str = "luks") -> bytes:
        """What the guest sees."""
        raw = self.folder / "content.raw"
        source = self.options(path, fmt, method)
        images.run("qemu-img", "convert", *self.secret, "--image-opts", source, "-O", "raw", raw, cwd=self.folder)
        content = raw.read_bytes()
        raw.unlink()
        return content

    def check(self, path: Path, method: str = "luks") -> None:
        """A qcow2 image is clean."""
        shown = self.options(path, "qcow2", method)
        images.run("qemu-img", "check", *self.secret, "--image-opts", shown, cwd=self.folder)

    def map(self, path: Path, fmt: str, method: str = "luks") -> list[dict[str, Any]]:
        """``qemu-img map``."""
        text = images.run(
            "qemu-img", "map", "--output=json", *self.secret, "--image-opts", self.options(path, fmt, method)
        )
        rows: list[dict[str, Any]] = json.loads(text)
        return rows


@functools.lru_cache(maxsize=32)
def _empty(fmt: str, options: str, size: str) -> bytes:
    """An empty image as qemu-img makes it, with SECRET. It takes seconds, however little ``iter-time`` is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty"
        Stock(Path(folder))._create(path, fmt, options, size)
        return path.read_bytes()


def options_of(text: str) -> dict[str, str]:
    """``-o`` as a dict."""
    return dict(item.split("=", 1) for item in text.split(",") if item)
