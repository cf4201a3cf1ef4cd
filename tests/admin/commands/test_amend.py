"""``x-blockdev-amend``: passphrases of nodes that clients use."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from nbdserve.formats.registry import driver_for
from nbdserve.storage.file import FileStorage
from tests.admin.clients import RawClient
from tests.admin.images import needs_images
from tests.cli.processes import run, until

pytestmark = needs_images


def amend(client: RawClient, node: str, **more: Any) -> str | None:
    """The error of the job, if it fails."""
    given = {name.replace("_", "-"): value for name, value in more.items()}
    assert client.execute("x-blockdev-amend", job_id="j", node_name=node, **given) == {}
    until(lambda: _job(client)["status"] == "concluded", "the job ends")
    assert _job(client)["type"] == "amend"
    error: str | None = _job(client).get("error")
    assert client.execute("job-dismiss", id="j") == {}
    return error


def _job(client: RawClient) -> dict[str, Any]:
    (job,) = client.execute("query-jobs")
    return dict(job)


async def _make(path: Path, driver: str) -> None:
    """An image that the passphrase ``a`` opens, and soon: stock tools look for a second how fast they are."""
    storage = await FileStorage.open(str(path), create=True)
    options = {"iter-time": "0"} if driver == "luks" else {"encrypt.format": "luks", "encrypt.iter-time": "0"}
    await driver_for(driver).create(storage, 1 << 20, options, secret=b"passphrase a")
    await storage.close()


@pytest.mark.parametrize("driver", ["luks", "qcow2"])
def test_passphrases_come_and_go(client: RawClient, images: Path, driver: str) -> None:
    path, objects = images / "encrypted", []
    for name in "ab":
        (images / name).write_bytes(b"passphrase " + name.encode())
        objects += ["--object", f"secret,id={name},file={images / name}"]
        assert client.execute("object-add", qom_type="secret", id=name, file=str(images / name)) == {}
    prefix = "" if driver == "luks" else "encrypt."
    asyncio.run(_make(path, driver))
    key = {"encrypt": {"format": "luks", "key-secret": "a"}} if prefix else {"key-secret": "a"}
    node = {"driver": driver, "node-name": "n", "file": {"driver": "file", "filename": str(path)}} | key
    assert client.execute("blockdev-add", **node) == {}

    def change(*, force: bool = False, **slot: Any) -> str | None:
        given = {name.replace("_", "-"): value for name, value in slot.items()}
        nested = {"encrypt": {"format": "luks"} | given} if prefix else given
        return amend(client, "n", options={"driver": driver} | nested, force=force)

    assert change(state="active", new_secret="z") == "No secret with id 'z'"
    assert str(change(state="inactive", keyslot=0)).startswith("Attempt to erase the only active keyslot 0")
    assert change(state="active", new_secret="b", iter_time=0) is None
    assert change(state="inactive", keyslot=0) is None
    more = {} if driver == "luks" else {"backing": None}
    assert client.execute("blockdev-reopen", options=[node | more | {"detect-zeroes": "on"}]) == {}, (
        "with the other one"
    )
    assert change(state="active", new_secret="a", iter_time=0, secret="b", keyslot=3) is None
    assert change(state="inactive", keyslot=3) is None
    assert client.execute("blockdev-del", node_name="n") == {}
    for secret in "ab":
        spec = f"driver={driver},file.filename={path},{prefix}key-secret={secret}"
        opened = run("qemu-img", "map", "--output=json", *objects, "--image-opts", spec)
        assert (opened.returncode == 0) == (secret == "b"), opened.stderr


def test_images_that_are_not_encrypted(client: RawClient, images: Path) -> None:
    file = {"driver": "file", "filename": str(images / "a.qcow2")}
    assert client.execute("blockdev-add", driver="qcow2", node_name="q", file=file) == {}
    assert amend(client, "q", options={"driver": "qcow2"}) is None
    slots = {"format": "luks", "state": "inactive", "keyslot": 1}
    refused = amend(client, "q", options={"driver": "qcow2", "encrypt": slots})
    assert refused == "image is not encrypted, can't amend"
    refused = amend(client, "q", options={"driver": "qcow2", "encrypt": {"format": "qcow"}})
    assert refused == "Amend can't be used to change the qcow2 encryption format"
    read_only = {"driver": "qcow2", "node-name": "q", "read-only": True, "file": file}
    assert client.execute("blockdev-reopen", options=[read_only]) == {}
    refused = client.execute("x-blockdev-amend", job_id="j", node_name="q", options={"driver": "qcow2"})
    assert refused == "Block node is read-only: 'q'"
