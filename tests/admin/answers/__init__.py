"""Commands in a row, and what qemu-storage-daemon 7.2 answers.

``{D}`` is a directory with the images a.qcow2, b.raw and o.qcow2, whose backing file is a.qcow2.
"""

from __future__ import annotations

from typing import Final

from tests.admin.answers import amend, bitmaps, exports, jobs, nodes, objects, snapshots, throttle, transactions
from tests.admin.answers.row import Row

ALL: Final[dict[str, list[Row]]] = {
    "nodes": nodes.ROWS,
    "exports": exports.ROWS,
    "objects": objects.ROWS,
    "throttle": throttle.ROWS,
    "bitmaps": bitmaps.ROWS,
    "transactions": transactions.ROWS,
    "jobs": jobs.ROWS,
    "snapshots": snapshots.ROWS,
    "amend": amend.ROWS,
}
