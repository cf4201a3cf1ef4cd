"""What qemu-storage-daemon answers to commands about jobs."""

from tests.admin.answers.row import Row

ROWS: list[Row] = [
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "o", "file": {"driver": "file", "filename": "{D}/o.qcow2"}},
        None,
    ),
    ("blockdev-add", {"driver": "null-co", "node-name": "n"}, None),
    ("job-cancel", {"id": "z"}, "Job not found"),
    ("job-complete", {"id": "z"}, "Job not found"),
    ("job-pause", {"id": "z"}, "Job not found"),
    ("job-dismiss", {"id": "z"}, "Job not found"),
    ("job-finalize", {"id": "z"}, "Job not found"),
    ("block-job-cancel", {"device": "z"}, "Block job 'z' not found"),
    ("block-job-pause", {"device": "z"}, "Block job 'z' not found"),
    ("block-job-set-speed", {"device": "z", "speed": 5}, "Block job 'z' not found"),
    ("block-job-complete", {"device": "z"}, "Block job 'z' not found"),
    ("job-cancel", {}, "Parameter 'id' is missing"),
    ("block-job-cancel", {"device": "z", "force": 1}, "Invalid parameter type for 'force', expected: boolean"),
    ("blockdev-mirror", {"job-id": "m", "device": "o", "target": "o", "sync": "full"}, "Can't mirror node into itself"),
    ("blockdev-add", {"driver": "null-co", "node-name": "t", "size": 1048576}, None),
    (
        "blockdev-mirror",
        {"job-id": "m", "device": "o", "target": "t", "sync": "full", "granularity": 100},
        "Parameter 'granularity' expects a value in range [512B, 64MB]",
    ),
    ("blockdev-mirror", {"job-id": "1m", "device": "o", "target": "t", "sync": "full"}, "Invalid job ID '1m'"),
    (
        "blockdev-mirror",
        {"job-id": "m", "device": "o", "target": "zz", "sync": "full"},
        "Cannot find device='zz' nor node-name='zz'",
    ),
    (
        "blockdev-mirror",
        {"job-id": "m", "device": "o", "target": "t", "sync": "zz"},
        "Parameter 'sync' does not accept value 'zz'",
    ),
    ("block-commit", {"device": "o"}, "Invalid job ID ''"),
    ("block-stream", {"device": "o"}, "Invalid job ID ''"),
    ("block-commit", {"device": "zz", "job-id": "x"}, "Device 'zz' not found"),
    ("block-commit", {"device": "n", "job-id": "x"}, "cannot commit an image into itself"),
    ("block-commit", {"device": "o", "job-id": "x", "base": "/nope"}, "Can't find '/nope' in the backing chain"),
    ("block-commit", {"device": "o", "job-id": "x", "base-node": "n"}, "'n' is not in this backing file chain"),
    ("block-stream", {"device": "o", "job-id": "s", "base": "/nope"}, "Can't find '/nope' in the backing chain"),
    (
        "block-stream",
        {"device": "o", "job-id": "s", "base-node": "n", "base": "x"},
        "'base' and 'base-node' cannot be specified at the same time",
    ),
]
