"""Checking a VHD: footers against each other, the header, the table against the file; and what can be repaired.

Repairing leaves the image at least as sound at every moment: a block is copied before an entry shows the copy, and the
footer is last in the file throughout.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from nbdserve.formats.base import CheckResult
from nbdserve.formats.tables import AnyWords
from nbdserve.formats.vpc import image, layout
from nbdserve.formats.vpc.fixed import FixedDriver
from nbdserve.formats.vpc.image import BAD
from nbdserve.formats.vpc.layout import ENTRY_SIZE, UNUSED, DynamicHeader, Locator
from nbdserve.formats.vpc.space import BlockSpace
from nbdserve.units import MIB, SECTOR_SIZE, div_ceil

if TYPE_CHECKING:
    from nbdserve.formats.vpc.driver import VpcDriver

_MOST_MESSAGES: Final = 20
"""Of one kind."""


async def check_vpc(driver: VpcDriver, *, repair_leaks: bool, repair_errors: bool) -> CheckResult:
    """See ``FormatDriver.check``.

    A leak is room for a block between the last one and the footer, and a footer that a resize did not come to: the copy
    at the beginning counts, and the next block that is allocated puts the footer right.
    """
    found = await _Check(driver).run()
    errors, leaks = repair_errors and found.corruptions > 0, repair_leaks and found.leaks > 0
    if not (errors or leaks):
        return found
    await _repair(driver, errors=errors)
    again = await type(driver).open(driver.storage, {"has_backing": True}, read_only=True)
    left = await _Check(again).run()
    left.messages = found.messages + left.messages
    left.corruptions_fixed = max(0, found.corruptions - left.corruptions)
    left.leaks_fixed = max(0, found.leaks - left.leaks)
    return left


class _Check:
    def __init__(self, driver: VpcDriver) -> None:
        self.driver = driver
        self.result = CheckResult(image_end_offset=driver.storage.size)

    async def run(self) -> CheckResult:
        self._footers()
        if not isinstance(self.driver, FixedDriver):
            words = await _stored_words(self.driver)
            self._header()
            self._table(words)
            self._space(words)
        return self.result

    def _error(self, message: str) -> None:
        self.result.corruptions += 1
        self.result.messages.append(f"ERROR {message}")

    def _leak(self, count: int, message: str) -> None:
        self.result.leaks += count
        self.result.messages.append(f"Leaked: {message}")

    def _footers(self) -> None:
        driver, footers = self.driver, self.driver.footers
        copies = [("footer", footers.end)]
        if not isinstance(driver, FixedDriver):
            copies.append(("copy of the footer at the beginning", footers.begin))
        for what, footer in copies:
            if footer is None:
                if driver.storage.grows_zeroed or what != "footer":  # on a device it is not at the end
                    self._error(f"{what}: missing")
            elif not footer.sound:
                self._error(f"{what}: wrong checksum")
            elif footer.size < driver.size and footer.with_size_of(driver.footer) == driver.footer:
                self._leak(1, f"the {what} has {footer.size} bytes, as before a resize that was cut short")
            elif footer != driver.footer:
                now = driver.footer
                old = replace(footer, disk_type=now.disk_type, data_offset=now.data_offset)
                if old == now and footer.disk_type in (layout.DYNAMIC, layout.DIFFERENCING):
                    self._leak(1, f"the {what} is that of before another parent was named, which was cut short")
                else:
                    self._error(f"{what}: differs from the other one")

    def _header(self) -> None:
        header = self.driver.header
        if not header.sound:
            self._error("dynamic disk header: wrong checksum")
        if header.table_offset % SECTOR_SIZE:
            self._error(f"dynamic disk header: table offset = {header.table_offset:#x} is not a multiple of 512")
        if _mended(self.driver) != header:
            self._error("dynamic disk header: what it points at does not end inside the file")

    def _table(self, words: AnyWords) -> None:
        driver, result = self.driver, self.result
        result.total_clusters = len(words)
        problems = _misplaced(driver, words)
        for index, problem in list(problems.items())[:_MOST_MESSAGES]:
            result.messages.append(f"ERROR table entry {index} = {int(words[index]):#x}: {problem}")
        if len(problems) > _MOST_MESSAGES:
            result.messages.append(f"ERROR ... and {len(problems) - _MOST_MESSAGES} more table entries")
        result.corruptions += len(problems)
        used = words[words != UNUSED].astype(np.int64)
        result.allocated_clusters = len(used)
        stride = _stride(driver)
        steps = np.diff(used)
        result.fragmented_clusters = int((steps != stride).sum())

    def _space(self, words: AnyWords) -> None:
        driver, result = self.driver, self.result
        end = image.used_end(driver.footer, _mended(driver), driver.table.words)
        result.image_end_offset = end + layout.FOOTER_SIZE
        tail = driver.storage.size - result.image_end_offset
        if driver.storage.grows_zeroed and tail > 0:
            blocks = tail // (_stride(driver) * SECTOR_SIZE)
            if blocks:
                self._leak(blocks, f"{tail} bytes between the last block and the footer")


def _stride(driver: VpcDriver) -> int:
    """Sectors of a block with its bitmap."""
    return (driver.header.bitmap_size + driver.header.block_size) // SECTOR_SIZE


def _mended(driver: VpcDriver) -> DynamicHeader:
    """The header without what it says to be outside the file: parent locators, and entries behind those of the disk.

    The parent's name is in the header as well.
    """
    header, size = driver.header, driver.storage.size
    is_inside = header.table_offset + header.max_entries * ENTRY_SIZE <= size
    entries = header.max_entries if is_inside else len(driver.table.words)
    lost = [at for at in image.used_locators(driver.footer, header) if at.offset + at.length > size]
    locators = tuple(Locator(bytes(4), 0, 0) if at in lost else at for at in header.locators)
    return replace(header, max_entries=entries, locators=locators)


async def _stored_words(driver: VpcDriver) -> AnyWords:
    """The entries as they are on disk."""
    stored = await driver.storage.read(driver.header.table_offset, len(driver.table.words) * ENTRY_SIZE)
    return np.frombuffer(stored, ">u4").astype(np.uint32)


def _misplaced(driver: VpcDriver, words: AnyWords) -> dict[int, str]:
    """What is wrong with the place of a block, by its number. Of two blocks in one place the first one is right."""
    problems: dict[int, str] = {}
    stride, size = _stride(driver), driver.storage.size
    outside = driver.table.words == BAD
    for index in np.flatnonzero(outside).tolist():
        lost = int(words[index]) * SECTOR_SIZE + driver.header.bitmap_size >= size
        problems[index] = "not inside the file" if lost else "not wholly inside the file"
    left = (words != UNUSED) & ~outside
    places = words.astype(np.int64)
    for start, end, what in image.metadata_ranges(driver.footer, _mended(driver)):
        first, last = start // SECTOR_SIZE, div_ceil(end, SECTOR_SIZE)
        inside = left & (places < min(last, BAD)) & (places + stride > min(first, BAD))
        problems.update(dict.fromkeys(np.flatnonzero(inside).tolist(), f"in {what}"))
        left &= ~inside
    order = np.flatnonzero(left)
    order = order[np.argsort(places[order], kind="stable")]
    near = np.flatnonzero(np.diff(places[order]) < stride) + 1
    # One that is in the place of the last right one is not in the way of the next.
    last, owner = -stride, -1
    for at in np.unique(np.concatenate((near - 1, near))).tolist():
        index = int(order[at])
        if places[index] < last + stride:
            problems[index] = f"in the place of block {owner}"
        else:
            last, owner = int(places[index]), index
    return problems


async def _repair(driver: VpcDriver, *, errors: bool) -> None:
    """Write everything anew that is wrong, the end of the file included."""
    storage, footer = driver.storage, driver.footer
    if isinstance(driver, FixedDriver):
        size = driver.footers.end_size
        await storage.write_stable([(storage.size - size, footer.build()[:size])])
        return
    header, words = _mended(driver), await _stored_words(driver)
    problems = _misplaced(driver, words) if errors else {}
    kept = words.copy()
    moved: list[int] = []
    for index, problem in problems.items():
        if problem == "not inside the file":
            kept[index] = UNUSED
        elif problem != "not wholly inside the file":
            moved.append(index)
    end = image.used_end(footer, header, kept)
    space = BlockSpace(storage, footer.build(), end, block_size=header.block_size, bitmap_size=header.bitmap_size)
    await space.tidy()
    for index in moved:
        (place,) = await space.take(1)
        await _copy(driver, int(words[index]) * SECTOR_SIZE, place)
        kept[index] = place // SECTOR_SIZE
    await storage.flush()
    if errors:
        await storage.write_stable([(header.table_offset, kept.astype(">u4").tobytes())])
        await storage.write_stable([(footer.data_offset, header.build()), (0, footer.build())])
    await space.tidy()


async def _copy(driver: VpcDriver, source: int, target: int) -> None:
    """Copy a block with its bitmap."""
    length = driver.header.bitmap_size + driver.header.block_size
    for at in range(0, length, MIB):
        await driver.storage.write(target + at, await driver.storage.read(source + at, min(MIB, length - at)))
