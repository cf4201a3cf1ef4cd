import numpy as np

from nbdserve.formats.qcow2 import layout
from nbdserve.formats.qcow2.check_walk import MAX_MESSAGES, Findings, Window, decode_l2, read_clusters
from nbdserve.formats.qcow2.header import Header
from nbdserve.storage.memory import MemoryStorage


def test_a_window_counts_only_its_own_clusters() -> None:
    window = Window(100, 10)
    window.add(np.array([99, 100, 100, 109, 110]))
    assert window.counts.tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    window.add(np.array([100, 105, 300]), np.array([3, 4, 5]))
    assert window.counts[0] == 5
    assert window.counts[5] == 4
    window.add_range(0, 101)
    assert window.counts[:3].tolist() == [6, 1, 0]


def test_sparse_references_count_like_dense_ones() -> None:
    clusters = np.array([3, 900_000, 3, 999_999])
    window = Window(0, 1_000_000)
    window.add(clusters, np.array([1, 2, 1, 1]))
    assert [int(window.counts[at]) for at in (3, 900_000, 999_999)] == [2, 2, 1]
    assert int(window.counts.sum()) == 5


def test_counts_are_capped_at_what_a_refcount_says() -> None:
    window = Window(0, 4)
    window.add(np.array([1, 1, 1, 2]))
    assert window.saturate(0).tolist() == [1]
    assert window.counts.tolist() == [0, 1, 1, 0]
    window.add_range(1, 1)
    assert window.saturate(6).tolist() == []


def test_messages_are_bounded_but_all_is_counted() -> None:
    findings = Findings()
    for _ in range(MAX_MESSAGES + 50):
        findings.corruption("x")
    assert findings.result.corruptions == MAX_MESSAGES + 50
    assert len(findings.result.messages) == MAX_MESSAGES + 1


async def test_scattered_clusters_come_in_the_order_asked_for() -> None:
    storage = MemoryStorage()
    await storage.write(0, b"".join(bytes([number]) * 512 for number in range(8)))
    data = await read_clusters(storage, np.array([512, 1024, 2048, 3584]), 512)
    assert [data[at] for at in range(0, len(data), 512)] == [1, 2, 4, 7]


def header(incompatible: int = 0) -> Header:
    return Header(3, 16, 1 << 30, 0x30000, 2, 0x10000, 1, incompatible=incompatible)


def test_an_empty_entry_with_copied_is_data_only_in_an_external_file() -> None:
    words = np.zeros(8192, ">u8")
    words[1] = layout.COPIED
    one = np.array([1])
    inside = decode_l2(header(), bytearray(words.tobytes()), one, one, one)
    assert not inside.allocated.any()
    outside = decode_l2(header(layout.INCOMPATIBLE_DATA_FILE), bytearray(words.tobytes()), one, one, one)
    assert np.flatnonzero(outside.allocated).tolist() == [1]
