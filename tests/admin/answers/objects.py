"""What qemu-storage-daemon answers to commands about objects."""

from tests.admin.answers.row import Row

ROWS: list[Row] = [
    ("object-add", {"qom-type": "zz", "id": "g"}, "Parameter 'qom-type' does not accept value 'zz'"),
    ("object-add", {"qom-type": "iothread", "id": "1g"}, "Parameter 'id' expects an identifier"),
    ("object-add", {"qom-type": "secret", "id": "s"}, "Either 'file' or 'data' must be provided"),
    ("object-add", {"qom-type": "iothread", "id": "io0"}, None),
    (
        "object-add",
        {"qom-type": "iothread", "id": "io0"},
        "attempt to add duplicate property 'io0' to object (type 'container')",
    ),
    ("object-del", {"id": "zz"}, "object 'zz' not found"),
    ("qom-list", {"path": "/objects"}, None),
    ("qom-list", {"path": "/nope"}, "Device '/nope' not found"),
    ("qom-get", {"path": "/objects/io0", "property": "zz"}, "Property 'iothread.zz' not found"),
    ("qom-set", {"path": "/nope", "property": "zz", "value": 1}, "Device '/nope' not found"),
    ("object-del", {"id": "io0"}, None),
    ("object-add", {"qom-type": "authz-list", "id": "az"}, None),
    ("qom-list", {"path": "/objects/az"}, None),
    ("qom-get", {"path": "/objects/az", "property": "policy"}, None),
    ("qom-get", {"path": "/objects/az", "property": "rules"}, None),
    (
        "object-add",
        {
            "qom-type": "authz-list",
            "id": "a2",
            "policy": "allow",
            "rules": [
                {"match": "fred", "policy": "allow", "format": "exact"},
                {"match": "*", "policy": "deny", "format": "glob"},
            ],
        },
        None,
    ),
    ("qom-get", {"path": "/objects/a2", "property": "rules"}, None),
    (
        "object-add",
        {"qom-type": "authz-list", "id": "a3", "policy": "zz"},
        "Parameter 'policy' does not accept value 'zz'",
    ),
    (
        "object-add",
        {"qom-type": "authz-list", "id": "a3", "rules": [{"match": "x"}]},
        "Parameter 'rules[0].policy' is missing",
    ),
    (
        "object-add",
        {"qom-type": "authz-list", "id": "a3", "rules": [{"match": "x", "policy": "allow", "format": "zz"}]},
        "Parameter 'format' does not accept value 'zz'",
    ),
    (
        "object-add",
        {"qom-type": "authz-list", "id": "a3", "rules": 5},
        "Invalid parameter type for 'rules', expected: array",
    ),
    ("object-add", {"qom-type": "authz-list", "id": "a3", "foo": 5}, "Parameter 'foo' is unexpected"),
    ("qom-set", {"path": "/objects/a2", "property": "policy", "value": "deny"}, None),
    ("qom-get", {"path": "/objects/a2", "property": "policy"}, None),
    (
        "qom-set",
        {"path": "/objects/a2", "property": "policy", "value": "zz"},
        "Parameter 'policy' does not accept value 'zz'",
    ),
    (
        "qom-set",
        {"path": "/objects/a2", "property": "policy", "value": 5},
        "Invalid parameter type for 'policy', expected: string",
    ),
    ("qom-set", {"path": "/objects/a2", "property": "rules", "value": []}, None),
    (
        "qom-set",
        {"path": "/objects/a2", "property": "rules", "value": [{"match": "x"}]},
        "Parameter 'rules[0].policy' is missing",
    ),
    (
        "qom-set",
        {"path": "/objects/a2", "property": "rules", "value": 5},
        "Invalid parameter type for 'rules', expected: array",
    ),
    ("qom-get", {"path": "/objects/a2", "property": "rules"}, None),
    ("object-del", {"id": "az"}, None),
]
