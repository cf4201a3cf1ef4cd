"""The whole server in one process on nasty storage, driven over several connections: every answer is checked."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest

from nbdserve.exports.export import Export, ExportTable
from nbdserve.server.server import Server
from tests.support.geometries import DIFFERENTIAL_GEOMETRIES, build, named
from tests.support.images import needs_qemu
from tests.support.model import ModelDisk
from tests.support.nbd import Connections
from tests.support.recording import Recorder
from tests.support.workload import Mix, Workload, read_all

OPERATIONS = int(os.environ.get("NBDSERVE_OPS", "150"))
SEED = int(os.environ.get("NBDSERVE_SEED", "1"))


@needs_qemu
@pytest.mark.parametrize("name", ["raw", "4k", "64k-backing", "64k-ext-snapshot", "4k-compressed", "64k-data-raw"])
async def test_no_stale_or_foreign_data_over_many_connections(name: str, tmp_path: Path) -> None:
    """A read after a reply sees what the reply was for, on whichever connection; overlapping writes in some order."""
    image = build(named(DIFFERENTIAL_GEOMETRIES, name))
    recorder = Recorder(SEED)
    node = await image.open([recorder.storage(content) for content in image.contents])
    exports = ExportTable()
    exports.add(Export("", node))
    server = Server(exports)
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        await server.listen(listener)
        disk = await Connections.connect(path, 4)
        model = ModelDisk(image.size, image.guest)
        workload = Workload(disk, model, random.Random(SEED), mix=Mix(in_flight=16))
        try:
            await workload.run(OPERATIONS)
            await workload.verify()
        finally:
            await disk.close()
            await server.stop(1.0)
    content = await read_all(node, node.size)
    model.check_read(content)
    await node.close()
