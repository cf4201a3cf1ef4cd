"""What qemu-storage-daemon answers to changes of images; what is wrong with the options' values, its job says."""

from tests.admin.answers.row import Row

ROWS: list[Row] = [
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "{D}/a.qcow2"}},
        None,
    ),
    ("blockdev-add", {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "{D}/b.raw"}}, None),
    ("x-blockdev-amend", {}, "Parameter 'job-id' is missing"),
    ("x-blockdev-amend", {"job-id": "j"}, "Parameter 'node-name' is missing"),
    ("x-blockdev-amend", {"job-id": "j", "node-name": "q"}, "Parameter 'options' is missing"),
    (
        "x-blockdev-amend",
        {"job-id": "j", "node-name": "q", "options": {"driver": "luks"}},
        "Parameter 'options.state' is missing",
    ),
    (
        "x-blockdev-amend",
        {"job-id": "j", "node-name": "q", "options": {"driver": "qcow2", "encrypt": {"format": "luks", "state": "x"}}},
        "Parameter 'state' does not accept value 'x'",
    ),
    (
        "x-blockdev-amend",
        {"job-id": "j", "node-name": "q", "options": {"driver": "luks", "state": "active", "keyslot": "1"}},
        "Invalid parameter type for 'options.keyslot', expected: integer",
    ),
    (
        "x-blockdev-amend",
        {"job-id": "j", "node-name": "zz", "options": {"driver": "luks", "state": "active"}},
        "Cannot find device='' nor node-name='zz'",
    ),
    (
        "x-blockdev-amend",
        {"job-id": "j", "node-name": "q", "options": {"driver": "luks", "state": "active"}},
        "x-blockdev-amend doesn't support changing the block driver",
    ),
    (
        "x-blockdev-amend",
        {"job-id": "j", "node-name": "q", "options": {"driver": "raw"}},
        "x-blockdev-amend doesn't support changing the block driver",
    ),
    (
        "x-blockdev-amend",
        {"job-id": "j", "node-name": "r", "options": {"driver": "raw"}},
        "Driver does not support x-blockdev-amend",
    ),
    ("x-blockdev-amend", {"job-id": "1j", "node-name": "q", "options": {"driver": "qcow2"}}, "Invalid job ID '1j'"),
    ("x-blockdev-amend", {"job-id": "j", "node-name": "q", "options": {"driver": "qcow2"}}, None),
]
