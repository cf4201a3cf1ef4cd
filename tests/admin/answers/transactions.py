"""What qemu-storage-daemon answers to commands about transactions."""

from tests.admin.answers.row import Row

ROWS: list[Row] = [
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": "{D}/o.qcow2"}},
        None,
    ),
    ("blockdev-add", {"driver": "null-co", "node-name": "n"}, None),
    ("block-dirty-bitmap-add", {"node": "o", "name": "b"}, None),
    ("transaction", {}, "Parameter 'actions' is missing"),
    ("transaction", {"actions": 5}, "Invalid parameter type for 'actions', expected: array"),
    ("transaction", {"actions": [{}]}, "Parameter 'actions[0].type' is missing"),
    ("transaction", {"actions": [{"type": "zz"}]}, "Parameter 'type' does not accept value 'zz'"),
    ("transaction", {"actions": [{"type": "abort"}]}, "Parameter 'actions[0].data' is missing"),
    ("transaction", {"actions": [{"type": "abort", "data": {}}]}, "Transaction aborted using Abort action"),
    (
        "transaction",
        {"actions": [{"type": "block-dirty-bitmap-clear", "data": {"node": "o", "name": "zz"}}]},
        "Dirty bitmap 'zz' not found",
    ),
    ("transaction", {"actions": [5]}, "Invalid parameter type for 'actions[0]', expected: object"),
    (
        "transaction",
        {"actions": [{"type": "block-dirty-bitmap-clear", "data": {"node": "o"}}]},
        "Parameter 'actions[0].data.name' is missing",
    ),
    ("transaction", {"actions": []}, None),
    (
        "transaction",
        {"actions": [], "properties": {"completion-mode": "x"}},
        "Parameter 'completion-mode' does not accept value 'x'",
    ),
    (
        "transaction",
        {
            "actions": [
                {"type": "block-dirty-bitmap-add", "data": {"node": "o", "name": "t"}},
                {"type": "block-dirty-bitmap-remove", "data": {"node": "o", "name": "b"}},
                {"type": "abort", "data": {}},
            ]
        },
        "Transaction aborted using Abort action",
    ),
    (
        "transaction",
        {
            "actions": [
                {"type": "block-dirty-bitmap-remove", "data": {"node": "o", "name": "b"}},
                {"type": "block-dirty-bitmap-clear", "data": {"node": "o", "name": "b"}},
            ]
        },
        "Bitmap 'b' is currently in use by another operation and cannot be used",
    ),
    ("block-dirty-bitmap-remove", {"node": "o", "name": "t"}, "Dirty bitmap 't' not found"),
    ("block-dirty-bitmap-clear", {"node": "o", "name": "b"}, None),
]
