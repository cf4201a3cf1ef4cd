"""What qemu-storage-daemon answers to commands about nodes: opening, closing and resizing them."""

from typing import Any

from tests.admin.answers.row import Row


def _over(more: dict[str, Any] | None, answer: str | None) -> Row:
    """The overlay is opened again."""
    given = {"driver": "qcow2", "node-name": "o", "file": "of"} | (more or {})
    return ("blockdev-reopen", {"options": [given]}, answer)


def _on(name: str, answer: str | None) -> Row:
    """The overlay is opened on a node."""
    file = {"driver": "file", "filename": "{D}/o.qcow2"}
    return ("blockdev-add", {"driver": "qcow2", "node-name": "o", "file": file, "backing": name}, answer)


ROWS: list[Row] = [
    ("blockdev-add", {}, "Parameter 'driver' is missing"),
    ("blockdev-add", {"driver": "nope"}, "Parameter 'driver' does not accept value 'nope'"),
    ("blockdev-add", {"driver": 5}, "Invalid parameter type for 'driver', expected: string"),
    ("blockdev-add", {"driver": "raw"}, "Parameter 'file' is missing"),
    ("blockdev-add", {"driver": "raw", "file": 5}, "Invalid parameter type for 'file', expected: BlockdevRef"),
    ("blockdev-add", {"driver": "raw", "file": None}, "Invalid parameter type for 'file', expected: BlockdevRef"),
    ("blockdev-add", {"driver": "raw", "file": "nope"}, "'node-name' must be specified for the root node"),
    ("blockdev-add", {"driver": "raw", "file": {}}, "Parameter 'file.driver' is missing"),
    ("blockdev-add", {"driver": "raw", "file": {"driver": "file"}}, "Parameter 'file.filename' is missing"),
    (
        "blockdev-add",
        {"driver": "raw", "file": {"driver": "file", "filename": 5}},
        "Invalid parameter type for 'file.filename', expected: string",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "file": {"driver": "file", "filename": "{D}/nope"}},
        "'node-name' must be specified for the root node",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "{D}/nope"}},
        "Could not open '{D}/nope': No such file or directory",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "{D}/nope", "foo": 1}},
        "Parameter 'file.foo' is unexpected",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "x", "foo": 1, "file": {"driver": "file", "filename": "{D}/nope", "foo": 1}},
        "Parameter 'file.foo' is unexpected",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "1x", "file": {"driver": "file", "filename": "{D}/b.raw"}},
        "Invalid node-name: '1x'",
    ),
    (
        "blockdev-add",
        {
            "driver": "raw",
            "node-name": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "file": {"driver": "file", "filename": "{D}/b.raw"},
        },
        "Node name too long",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "", "file": {"driver": "file", "filename": "{D}/b.raw"}},
        "Invalid node-name: ''",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "r", "offset": "x", "file": {"driver": "file", "filename": "{D}/b.raw"}},
        "Invalid parameter type for 'offset', expected: integer",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "r", "read-only": "x", "file": {"driver": "file", "filename": "{D}/b.raw"}},
        "Invalid parameter type for 'read-only', expected: boolean",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "r", "offset": -1, "file": {"driver": "file", "filename": "{D}/b.raw"}},
        "Parameter 'offset' expects a non-negative number below 2^64",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "r", "offset": 1.5, "file": {"driver": "file", "filename": "{D}/b.raw"}},
        "Invalid parameter type for 'offset', expected: integer",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "r", "cache": [], "file": {"driver": "file", "filename": "{D}/b.raw"}},
        "Invalid parameter type for 'cache', expected: object",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "r", "discard": "x", "file": {"driver": "file", "filename": "{D}/b.raw"}},
        "Parameter 'discard' does not accept value 'x'",
    ),
    (
        "blockdev-add",
        {
            "driver": "raw",
            "node-name": "r",
            "detect-zeroes": "unmap",
            "file": {"driver": "file", "filename": "{D}/b.raw"},
        },
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
    ),
    ("blockdev-add", {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "{D}/b.raw"}}, None),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "{D}/b.raw"}},
        "Duplicate nodes with node-name='r'",
    ),
    ("blockdev-add", {"driver": "file", "node-name": "ff", "filename": "{D}/a.qcow2"}, None),
    ("blockdev-add", {"driver": "qcow2", "node-name": "qq", "file": "ff"}, None),
    ("blockdev-del", {"node-name": "ff"}, "Block device ff is in use"),
    ("blockdev-add", {"driver": "null-co", "node-name": "n0"}, None),
    ("blockdev-add", {"driver": "null-co", "node-name": "n1", "size": 123456, "read-zeroes": True}, None),
    ("block_resize", {"node-name": "n1", "size": 5}, "Image format driver does not support resize"),
    ("block_resize", {"size": 5}, "Cannot find device='' nor node-name=''"),
    ("block_resize", {"node-name": "zz", "size": 5}, "Cannot find device='' nor node-name='zz'"),
    ("block_resize", {"node-name": "zz", "device": "r", "size": 5}, "Cannot find device='r' nor node-name='zz'"),
    ("block_resize", {"node-name": "r", "size": -5}, "Parameter 'size' expects a >0 size"),
    ("block_resize", {"node-name": "r", "size": 2097152}, None),
    ("block_resize", {"node-name": "qq", "size": 5}, "The new size must be a multiple of 512"),
    ("blockdev-del", {"node-name": "qq"}, None),
    ("blockdev-del", {"node-name": "qq"}, "Failed to find node with node-name='qq'"),
    ("blockdev-del", {"node-name": "ff"}, None),
    ("blockdev-del", {"node-name": "r"}, None),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "{D}/b.raw", "discard": "x"}},
        "Parameter 'discard' does not accept value 'x'",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "x", "file": {"driver": "zz", "filename": "{D}/b.raw", "discard": "x"}},
        "Parameter 'driver' does not accept value 'zz'",
    ),
    (
        "blockdev-add",
        {"driver": "raw", "node-name": "x", "file": {"driver": "file", "filename": "{D}/b.raw", "locking": "zz"}},
        "Parameter 'locking' does not accept value 'zz'",
    ),
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "x", "file": "nope"},
        "Cannot find device='nope' nor node-name='nope'",
    ),
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "x", "file": {"driver": "file", "filename": "{D}/a.qcow2"}, "backing": 5},
        "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
    ),
    ("blockdev-add", {"driver": "file", "node-name": "x", "filename": "{D}"}, "Could not open '{D}': Is a directory"),
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": "{D}/o.qcow2", "node-name": "of"}},
        None,
    ),
    ("blockdev-del", {"node-name": "of"}, "Node of is not owned by the monitor"),
    ("blockdev-del", {"node-name": "o"}, None),
    ("blockdev-reopen", {}, "Parameter 'options' is missing"),
    ("blockdev-reopen", {"options": [{"driver": "qcow2", "file": "x"}]}, "node-name not specified"),
    (
        "blockdev-reopen",
        {"options": [{"driver": "qcow2", "node-name": "zz", "file": "x"}]},
        "Failed to find node with node-name='zz'",
    ),
    ("blockdev-add", {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "{D}/b.raw"}}, None),
    (
        "blockdev-reopen",
        {"options": [{"driver": "raw", "node-name": "r", "file": "x"}]},
        "Cannot find device='' nor node-name='x'",
    ),
    (
        "blockdev-reopen",
        {
            "options": [
                {
                    "driver": "raw",
                    "node-name": "r",
                    "read-only": True,
                    "file": {"driver": "file", "filename": "{D}/b.raw"},
                }
            ]
        },
        None,
    ),
    (
        "blockdev-reopen",
        {
            "options": [
                {
                    "driver": "raw",
                    "node-name": "r",
                    "read-only": True,
                    "file": {"driver": "file", "filename": "{D}/a.qcow2"},
                }
            ]
        },
        "Cannot change the option 'filename'",
    ),
    ("blockdev-reopen", {"options": [{"driver": "raw", "node-name": "r"}]}, "Parameter 'options[0].file' is missing"),
    ("blockdev-del", {"node-name": "r"}, None),
    ("blockdev-add", {"driver": "file", "node-name": "f", "filename": "{D}/a.qcow2"}, None),
    (
        "blockdev-reopen",
        {"options": [{"driver": "file", "node-name": "f", "filename": "{D}/b.raw"}]},
        "Cannot change the option 'filename'",
    ),
    ("blockdev-reopen", {"options": [{"driver": "file", "node-name": "f", "filename": "{D}/a.qcow2"}]}, None),
    ("blockdev-del", {"node-name": "f"}, None),
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "a", "read-only": True, "file": {"driver": "file", "filename": "{D}/a.qcow2"}},
        None,
    ),
    (
        "blockdev-add",
        {
            "driver": "qcow2",
            "node-name": "o",
            "file": {"driver": "file", "filename": "{D}/o.qcow2", "node-name": "of"},
            "backing": None,
        },
        None,
    ),
    _over(None, "backing is missing for 'o'"),
    _over({"backing": "zz"}, "Cannot find device='' nor node-name='zz'"),
    _over({"backing": "o"}, "Making 'o' a backing child of 'o' would create a cycle"),
    _over({"backing": "a"}, None),
    ("blockdev-del", {"node-name": "a"}, "Node 'a' is busy: node is used as backing hd of 'o'"),
    _over({"backing": {"driver": "null-co"}}, "Cannot change the option 'backing.driver'"),
    _over({"backing": "a", "cache": {"no-flush": True}}, None),
    _over({"backing": None}, None),
    ("blockdev-del", {"node-name": "a"}, None),
    _over(None, "backing is missing for 'o'"),
    ("blockdev-del", {"node-name": "o"}, None),
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "a", "read-only": True, "file": {"driver": "file", "filename": "{D}/a.qcow2"}},
        None,
    ),
    _on("zz", "Could not open backing file: Cannot find device='zz' nor node-name='zz'"),
    _on("a", None),
    ("blockdev-del", {"node-name": "a"}, "Node 'a' is busy: node is used as backing hd of 'o'"),
    ("blockdev-del", {"node-name": "o"}, None),
    ("blockdev-del", {"node-name": "a"}, None),
]
