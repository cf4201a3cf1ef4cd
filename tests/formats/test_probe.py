import pytest

from nbdserve.formats.probe import format_of, probe
from nbdserve.storage.memory import MemoryStorage


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"", "raw"),
        (bytes(512), "raw"),
        (b"QFI", "raw"),
        (b"QFI\xfb\0\0\0\1", "qcow"),
        (b"QFI\xfb\0\0\0\2", "qcow2"),
        (b"QFI\xfb\0\0\0\3", "qcow2"),
        (b"QED\0", "qed"),
        (b"KDMV\1", "vmdk"),
        (b"conectix", "vpc"),
        (bytes(64) + b"\x7f\x10\xda\xbe", "vdi"),
        (bytes(512) + b"QFI\xfb\0\0\0\3", "raw"),
    ],
)
def test_the_magic_decides(head: bytes, name: str) -> None:
    assert format_of(head) == name
    assert format_of(memoryview(head)) == name


async def test_a_storage_is_probed_by_its_first_sector() -> None:
    storage = MemoryStorage(size=8)
    assert await probe(storage) == "raw"
    await storage.write(0, b"QFI\xfb\0\0\0\3")
    assert await probe(storage) == "qcow2"
