"""What qemu-storage-daemon answers to commands about snapshots."""

from tests.admin.answers.row import Row

ROWS: list[Row] = [
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": "{D}/o.qcow2"}},
        None,
    ),
    ("blockdev-add", {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "{D}/b.raw"}}, None),
    (
        "blockdev-add",
        {
            "driver": "qcow2",
            "node-name": "ro",
            "read-only": True,
            "file": {"driver": "file", "filename": "{D}/a.qcow2"},
        },
        None,
    ),
    ("blockdev-snapshot-internal-sync", {}, "Parameter 'device' is missing"),
    ("blockdev-snapshot-internal-sync", {"device": "zz", "name": "s"}, "Cannot find device='zz' nor node-name='zz'"),
    (
        "blockdev-snapshot-internal-sync",
        {"device": "r", "name": "s"},
        "Block format 'raw' used by device 'r' does not support internal snapshots",
    ),
    ("blockdev-snapshot-internal-sync", {"device": "ro", "name": "s"}, "Device 'ro' is read only"),
    ("blockdev-snapshot-internal-sync", {"device": "o", "name": ""}, "Name is empty"),
    ("blockdev-snapshot-internal-sync", {"device": "o", "name": "s"}, None),
    (
        "blockdev-snapshot-internal-sync",
        {"device": "o", "name": "s"},
        "Snapshot with name 's' already exists on device 'o'",
    ),
    ("blockdev-snapshot-internal-sync", {"device": "o", "name": "t"}, None),
    ("blockdev-snapshot-delete-internal-sync", {"device": "o"}, "Name or id must be provided"),
    (
        "blockdev-snapshot-delete-internal-sync",
        {"device": "zz", "name": "s"},
        "Cannot find device='zz' nor node-name='zz'",
    ),
    (
        "blockdev-snapshot-delete-internal-sync",
        {"device": "r", "name": "s"},
        "Failed to get a snapshot list: Operation not supported",
    ),
    (
        "blockdev-snapshot-delete-internal-sync",
        {"device": "ro", "name": "s"},
        "Snapshot with id 'null' and name 's' does not exist on device 'ro'",
    ),
    (
        "blockdev-snapshot-delete-internal-sync",
        {"device": "o", "name": "zz"},
        "Snapshot with id 'null' and name 'zz' does not exist on device 'o'",
    ),
    (
        "blockdev-snapshot-delete-internal-sync",
        {"device": "o", "id": "9"},
        "Snapshot with id '9' and name 'null' does not exist on device 'o'",
    ),
    (
        "blockdev-snapshot-delete-internal-sync",
        {"device": "o", "name": "s", "id": "2"},
        "Snapshot with id '2' and name 's' does not exist on device 'o'",
    ),
    ("blockdev-snapshot-delete-internal-sync", {"device": "o", "name": "s"}, None),
    ("blockdev-snapshot-delete-internal-sync", {"device": "o", "id": "2"}, None),
    (
        "transaction",
        {
            "actions": [
                {"type": "blockdev-snapshot-internal-sync", "data": {"device": "o", "name": "u"}},
                {"type": "abort", "data": {}},
            ]
        },
        "Transaction aborted using Abort action",
    ),
    (
        "transaction",
        {"actions": [{"type": "blockdev-snapshot-internal-sync", "data": {"device": "o", "name": "u"}}]},
        None,
    ),
    ("blockdev-snapshot-delete-internal-sync", {"device": "o", "name": "u"}, None),
    ("blockdev-snapshot", {}, "Parameter 'node' is missing"),
    ("blockdev-snapshot", {"node": "zz", "overlay": "r"}, "Cannot find device='zz' nor node-name='zz'"),
    ("blockdev-snapshot", {"node": "o", "overlay": "zz"}, "Cannot find device='zz' nor node-name='zz'"),
    ("blockdev-snapshot", {"node": "o", "overlay": "o"}, "The overlay already has a backing image"),
    ("blockdev-snapshot", {"node": "o", "overlay": "r"}, "The overlay does not support backing images"),
]
