from nbdserve.block.description import full_name, image_info
from nbdserve.formats.base import BackingReference, ImageInfo, SnapshotInfo


def test_names_in_headers_begin_at_the_image() -> None:
    assert full_name("/d/top", "base") == "/d/base"
    assert full_name("top", "base") == "base"
    assert full_name("/d/top", "/e/base") == "/e/base"


def test_members_are_there_when_there_is_something_to_say() -> None:
    assert image_info("x", ImageInfo("raw", 512, dirty=None), 0) == {
        "virtual-size": 512, "filename": "x", "format": "raw", "actual-size": 0,
    }  # fmt: skip
    snapshot = SnapshotInfo("1", "s", 0, 5, 6, 7_000_000_008, 512)
    backing = BackingReference("b", "raw")
    facts = ImageInfo("qcow2", 512, 65536, backing, encrypted=True, specific={"a": 1}, snapshots=[snapshot])
    info = image_info("/d/x", facts, 1)
    assert info["full-backing-filename"] == "/d/b"
    assert info["format-specific"] == {"type": "qcow2", "data": {"a": 1}}
    assert (info["snapshots"][0]["vm-clock-sec"], info["snapshots"][0]["vm-clock-nsec"]) == (7, 8)
    assert info["encrypted"] is True
