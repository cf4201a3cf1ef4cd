"""The driver of qcow images (version 1) with the legacy AES encryption. Compressed clusters are not encrypted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbdserve.formats.encryption.guest_sectors import GuestSectorDriver, GuestSectorStorage, aes_cipher
from nbdserve.formats.qcow.driver import QcowDriver
from nbdserve.formats.qcow.layout import Header
from nbdserve.formats.tables import Table
from nbdserve.storage.base import Storage


class AesQcowDriver(GuestSectorDriver, QcowDriver):
    """One open encrypted image."""

    def __init__(self, storage: Storage, header: Header, l1: Table, options: Mapping[str, Any]) -> None:
        super().__init__(storage, header, l1, options)
        self.data = GuestSectorStorage(storage, aes_cipher(options, storage.path))
        self.zeroes_fast = False  # data clusters are zeroed where they are, and that is a write
