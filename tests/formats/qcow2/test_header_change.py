"""Headers changed while power may fail: the old one or the new one, also where they fill more than a sector."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbdserve.errors import ConfigError
from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.commit import HeaderSector
from nbdserve.formats.qcow2.create import create_qcow2
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.header_change import change_header
from tests.support.recording import ByteStorage, Recorder
from tests.support.replay import Replay

V2 = {"version": 2, "header_length": layout.HEADER_V2_LENGTH}


def _parse(content: bytes | bytearray) -> Header:
    return Header.parse(bytes(content[:65536]), "a", len(content))


def _without_names(header: Header) -> Header:
    kept = tuple(item for item in header.extensions if item[0] != layout.EXTENSION_FEATURE_NAMES)
    return replace(header, extensions=kept)


@pytest.mark.parametrize("name", ["b", "n" * 300, "n" * 1023])
async def test_every_crash_leaves_one_or_the_other(name: str) -> None:
    storage = ByteStorage()
    await create_qcow2(storage, 1 << 20, {"backing_file": name, "backing_fmt": "raw"})
    header = _parse(storage.content)
    kept = tuple(item for item in header.extensions if item[0] != layout.EXTENSION_FEATURE_NAMES)
    steps = [
        replace(header, extensions=kept, **V2),
        header,
        replace(header, extensions=((layout.EXTENSION_DATA_FILE, b"d" * 100), *header.extensions)),
        replace(header, backing_name=name + "2" if len(name) < 1023 else "3"),
        replace(header, compatible=1, extensions=kept),
    ]
    content = bytes(storage.content)
    for number, new in enumerate(steps):
        old = _parse(content)
        recorder = Recorder(number)
        recorded = recorder.storage(content)
        await change_header(recorded, HeaderSector(recorded, content[:512]), old, new)
        assert _parse(recorded.content) == new
        for state in Replay(recorder, None, number).states(60):
            assert _without_names(_parse(state.contents[0])) in (_without_names(old), _without_names(new))
        content = bytes(recorded.content)


async def test_what_does_not_fit_changes_nothing() -> None:
    storage = ByteStorage()
    await create_qcow2(storage, 1 << 20, {"cluster_size": "512"})
    header, before = _parse(storage.content), bytes(storage.content)
    for new in (
        replace(header, backing_name="n" * 600),
        replace(header, extensions=((0x1234, bytes(600)),)),
    ):
        with pytest.raises(ConfigError, match="header needs"):
            await change_header(storage, HeaderSector(storage, before[:512]), header, new)
    assert storage.content == before
