"""The course of a check and of a repair, whatever the format finds."""

from __future__ import annotations

import types

import pytest

from nbdserve.formats.base import CheckResult
from nbdserve.formats.flat_check import FlatCheck
from nbdserve.formats.flat_map import FlatMap, Scan
from nbdserve.storage.memory import MemoryStorage


class _Image:
    unit_called, outside_means, cluster_size = "unit", "nowhere", 4096

    def __init__(self) -> None:
        self.storage = MemoryStorage(bytes(1024))
        self.map = FlatMap(self.storage, 512, 100)


class _Check(FlatCheck):
    def __init__(self, corruptions: int, leaks: int) -> None:
        super().__init__(_Image())  # type: ignore[arg-type]
        self.faults = types.SimpleNamespace(corruptions=corruptions, leaks=leaks)
        self.calls: list[tuple[bool, bool]] = []

    async def judge(self) -> CheckResult:
        faults = self.faults
        return CheckResult(corruptions=faults.corruptions, leaks=faults.leaks, messages=[str(faults.corruptions)])

    async def repair(self, *, leaks: bool, errors: bool) -> None:
        self.calls.append((leaks, errors))
        if errors:
            self.faults.corruptions = 0
        if leaks:
            self.faults.leaks = 0


@pytest.mark.parametrize(
    ("faults", "how", "calls", "fixed"),
    [
        ((2, 3), (False, False), [], (0, 0)),
        ((2, 3), (True, True), [(True, True)], (2, 3)),
        ((2, 3), (True, False), [(True, False)], (0, 3)),
        ((2, 0), (True, True), [(False, True)], (2, 0)),
        ((0, 3), (False, True), [], (0, 0)),
    ],
)
async def test_what_is_asked_for_and_there_is_mended(
    faults: tuple[int, int], how: tuple[bool, bool], calls: list[tuple[bool, bool]], fixed: tuple[int, int]
) -> None:
    check = _Check(*faults)
    result = await check.run(repair_leaks=how[0], repair_errors=how[1])
    assert check.calls == calls
    assert (result.corruptions_fixed, result.leaks_fixed) == fixed
    assert (result.corruptions, result.leaks) == (faults[0] - fixed[0], faults[1] - fixed[1])
    assert result.messages == ([str(faults[0]), str(result.corruptions)] if calls else [str(faults[0])])


def test_faults_are_named_a_few_times_and_all_counted() -> None:
    result = CheckResult()
    _Check(0, 0).blame(result, Scan(outside=[1], duplicates=list(range(100))))
    assert result.corruptions == 101
    assert result.messages[:2] == [
        "ERROR: the unit at guest offset 0x1000 is nowhere",
        "ERROR: the unit at guest offset 0x0 shares its place with another unit",
    ]
    assert len(result.messages) == 21


async def test_words_are_changed_in_the_file() -> None:
    check = _Check(0, 0)
    await check.write_entry(3, 0x1234)
    assert await check.storage.read(512 + 12, 4) == b"\x34\x12\0\0"
    assert await check.entry(3) == 0x1234
