"""What qemu-storage-daemon answers to commands about throttle groups and nodes."""

from tests.admin.answers.row import Row

ROWS: list[Row] = [
    ("object-add", {"qom-type": "throttle-group", "id": "g0"}, None),
    (
        "object-add",
        {"qom-type": "throttle-group", "id": "g1", "limits": {"iops-total": 5, "iops-read": 3}},
        "bps/iops/max total values and read/write values cannot be used at the same time",
    ),
    (
        "object-add",
        {"qom-type": "throttle-group", "id": "g1", "limits": {"iops-total-max": 5}},
        "bps_max/iops_max require corresponding bps/iops values",
    ),
    (
        "object-add",
        {"qom-type": "throttle-group", "id": "g1", "limits": {"iops-total": 5, "iops-total-max": 3}},
        "bps_max/iops_max cannot be lower than bps/iops",
    ),
    (
        "object-add",
        {"qom-type": "throttle-group", "id": "g1", "limits": {"iops-total": 5, "iops-total-max-length": 0}},
        "the burst length cannot be 0",
    ),
    (
        "object-add",
        {"qom-type": "throttle-group", "id": "g1", "limits": {"iops-total": 5, "iops-total-max-length": 3}},
        "burst length set without burst rate",
    ),
    (
        "object-add",
        {"qom-type": "throttle-group", "id": "g1", "limits": {"iops-total": -5}},
        "bps/iops/max values must be within [0, 1000000000000000]",
    ),
    (
        "object-add",
        {"qom-type": "throttle-group", "id": "g1", "limits": {"iops-total": 5000000000000000}},
        "bps/iops/max values must be within [0, 1000000000000000]",
    ),
    (
        "object-add",
        {"qom-type": "throttle-group", "id": "g1", "limits": {"iops-size": 5}},
        "iops size requires an iops value to be set",
    ),
    (
        "object-add",
        {
            "qom-type": "throttle-group",
            "id": "g1",
            "limits": {"iops-total": 5, "iops-total-max": 30, "iops-total-max-length": -1},
        },
        "burst length too high for this burst rate",
    ),
    (
        "object-add",
        {
            "qom-type": "throttle-group",
            "id": "g1",
            "limits": {"iops-total": 5, "iops-total-max": 1000000000000000, "iops-total-max-length": 100},
        },
        "burst length too high for this burst rate",
    ),
    (
        "object-add",
        {
            "qom-type": "throttle-group",
            "id": "g1",
            "limits": {"iops-total": 5, "iops-total-max": 30, "iops-total-max-length": 4294967296},
        },
        "iops-total-max-length value must be in the range [0, 4294967295]",
    ),
    (
        "object-add",
        {
            "qom-type": "throttle-group",
            "id": "g1",
            "limits": {
                "bps-total": 1048576,
                "iops-total": 5,
                "iops-total-max": 30,
                "iops-total-max-length": 60,
                "iops-size": 4096,
            },
        },
        None,
    ),
    ("qom-get", {"path": "/objects/g1", "property": "limits"}, None),
    (
        "qom-set",
        {"path": "/objects/g1", "property": "limits", "value": {"bps-read": 5}},
        "bps/iops/max total values and read/write values cannot be used at the same time",
    ),
    ("qom-get", {"path": "/objects/g1", "property": "limits"}, None),
    ("qom-set", {"path": "/objects/g1", "property": "limits", "value": {}}, None),
    ("qom-get", {"path": "/objects/g1", "property": "limits"}, None),
    (
        "qom-set",
        {"path": "/objects/g1", "property": "limits", "value": 5},
        "Invalid parameter type for 'limits', expected: object",
    ),
    (
        "qom-set",
        {"path": "/objects/g1", "property": "limits", "value": {"foo": 5}},
        "Parameter 'limits.foo' is unexpected",
    ),
    ("qom-set", {"path": "/objects/g1", "property": "limits", "value": {"iops-total-max": 5}}, None),
    ("blockdev-add", {"driver": "throttle", "node-name": "t"}, "Parameter 'throttle-group' is missing"),
    ("blockdev-add", {"driver": "throttle", "node-name": "t", "throttle-group": "g1"}, "Parameter 'file' is missing"),
    (
        "blockdev-add",
        {"driver": "throttle", "node-name": "t", "throttle-group": "nope", "file": "nope"},
        "Cannot find device='nope' nor node-name='nope'",
    ),
    (
        "blockdev-add",
        {"driver": "throttle", "node-name": "t", "throttle-group": "g1", "file": "nope"},
        "Cannot find device='nope' nor node-name='nope'",
    ),
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": "{D}/a.qcow2"}},
        None,
    ),
    (
        "blockdev-add",
        {"driver": "throttle", "node-name": "t", "throttle-group": "nope", "file": "q"},
        "Throttle group 'nope' does not exist",
    ),
    ("blockdev-add", {"driver": "throttle", "node-name": "t", "throttle-group": "g1", "file": "q"}, None),
    ("blockdev-add", {"driver": "throttle", "node-name": "t2", "throttle-group": "g1", "file": "t"}, None),
    (
        "blockdev-add",
        {
            "driver": "throttle",
            "node-name": "t3",
            "throttle-group": "g1",
            "file": {"driver": "raw", "file": {"driver": "file", "filename": "{D}/b.raw"}},
        },
        None,
    ),
    ("object-del", {"id": "g1"}, "object 'g1' is in use, can not be deleted"),
    ("block_resize", {"node-name": "t", "size": 2097152}, None),
    ("blockdev-del", {"node-name": "q"}, "Block device q is in use"),
    ("blockdev-del", {"node-name": "t2"}, None),
    ("blockdev-del", {"node-name": "t"}, None),
    ("blockdev-del", {"node-name": "t3"}, None),
    ("object-del", {"id": "g1"}, None),
]
