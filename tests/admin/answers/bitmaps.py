"""What qemu-storage-daemon answers to commands about dirty bitmaps."""

from tests.admin.answers.row import Row

ROWS: list[Row] = [
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": "{D}/o.qcow2"}},
        None,
    ),
    ("blockdev-add", {"driver": "null-co", "node-name": "n"}, None),
    ("block-dirty-bitmap-add", {"node": "zz", "name": "b"}, "Cannot find device='zz' nor node-name='zz'"),
    ("block-dirty-bitmap-add", {"node": "o", "name": "b"}, None),
    ("block-dirty-bitmap-add", {"node": "o", "name": "b"}, "Bitmap already exists: b"),
    ("block-dirty-bitmap-add", {"node": "o", "name": ""}, "Bitmap name cannot be empty"),
    (
        "block-dirty-bitmap-add",
        {"node": "o", "name": "c", "granularity": 5},
        "Granularity must be power of 2 and at least 512",
    ),
    (
        "block-dirty-bitmap-add",
        {"node": "o", "name": "c", "granularity": -5},
        "Parameter 'granularity' expects uint32_t",
    ),
    (
        "block-dirty-bitmap-add",
        {"node": "o", "name": "c", "granularity": 4294967296},
        "Parameter 'granularity' expects uint32_t",
    ),
    ("block-dirty-bitmap-add", {"node": "o", "name": "c", "granularity": 2147483648}, None),
    (
        "block-dirty-bitmap-add",
        {"node": "n", "name": "c", "persistent": True},
        "Can't store persistent bitmaps to n: Operation not supported",
    ),
    ("block-dirty-bitmap-add", {"node": "n", "name": "q"}, None),
    ("block-dirty-bitmap-remove", {"node": "o", "name": "zz"}, "Dirty bitmap 'zz' not found"),
    ("block-dirty-bitmap-merge", {"node": "o", "target": "zz", "bitmaps": []}, "Dirty bitmap 'zz' not found"),
    ("block-dirty-bitmap-merge", {"node": "o", "target": "b", "bitmaps": ["zz"]}, "Dirty bitmap 'zz' not found"),
    (
        "block-dirty-bitmap-merge",
        {"node": "o", "target": "b", "bitmaps": [5]},
        "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr",
    ),
    (
        "block-dirty-bitmap-merge",
        {"node": "o", "target": "b", "bitmaps": [{"node": "n", "name": "q"}]},
        "Bitmaps are of different sizes (destination size is 1048576, source size is 1073741824) and can't be merged",
    ),
    (
        "block-dirty-bitmap-merge",
        {"node": "o", "target": "b", "bitmaps": [{"node": "n"}]},
        "Parameter 'bitmaps[0].name' is missing",
    ),
    ("block-dirty-bitmap-merge", {"node": "o", "target": "b", "bitmaps": ["c"]}, None),
    ("block-dirty-bitmap-disable", {"node": "o", "name": "b"}, None),
    ("block-dirty-bitmap-enable", {"node": "o", "name": "b"}, None),
    ("block-dirty-bitmap-clear", {"node": "o", "name": "b"}, None),
    ("block-dirty-bitmap-remove", {"node": "o", "name": "c"}, None),
    ("block-dirty-bitmap-remove", {"node": "o", "name": "c"}, "Dirty bitmap 'c' not found"),
    ("x-debug-block-dirty-bitmap-sha256", {"node": "o", "name": "b"}, None),
    ("x-debug-block-dirty-bitmap-sha256", {"node": "o", "name": "zz"}, "Dirty bitmap 'zz' not found"),
    ("x-debug-block-dirty-bitmap-sha256", {"node": "zz", "name": "zz"}, "Node 'zz' not found"),
]
