"""Where another backing file's name is put in a qcow2 header; ``tests/formats/test_set_backing.py`` has the crashes."""

from __future__ import annotations

from nbdserve.formats.base import BackingReference
from nbdserve.formats.qcow2.backing import header_with
from nbdserve.formats.qcow2.create import plan_image
from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.layout import EXTENSION_BACKING_FORMAT


def test_the_format_comes_first_and_the_other_extensions_stay() -> None:
    header = Header.parse(plan_image(1 << 20, {})[2], "image", 1 << 20)
    kinds = [kind for kind, _ in header.extensions]
    named = header_with(header, BackingReference("b", "qed"))
    assert [kind for kind, _ in named.extensions] == [EXTENSION_BACKING_FORMAT, *kinds]
    assert (named.backing_name, named.backing_format) == ("b", "qed")
    other = header_with(named, BackingReference("c", "raw"))
    assert (other.backing_name, other.backing_format, len(other.extensions)) == ("c", "raw", len(named.extensions))
    assert header_with(other, None) == header
