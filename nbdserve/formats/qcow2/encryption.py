"""The encryption of a qcow2 image's data: LUKS, or the legacy AES (docs/interop/qcow2.rst, "Full disk encryption").

Metadata is never encrypted, and neither are compressed clusters: QEMU writes and reads them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbdserve.formats.qcow2.header import Header
from nbdserve.formats.qcow2.layout import CRYPT_AES
from nbdserve.storage.base import Storage

if TYPE_CHECKING:
    from nbdserve.formats.luks.layout import Header as LuksHeader


async def open_encryption(
    storage: Storage, data: Storage, header: Header, options: Mapping[str, Any]
) -> tuple[Storage, LuksHeader | None]:
    """``data`` as the guest has it, and the LUKS header if there is one. ImageError as for ``open_volume``.

    With LUKS the sectors count from the start of the file the data is in.
    """
    if header.crypt_method == CRYPT_AES:
        from nbdserve.formats.encryption.guest_sectors import GuestSectorStorage, aes_cipher  # noqa: PLC0415  (few are)

        return GuestSectorStorage(data, aes_cipher(options, storage.path)), None
    if header.luks_area is None:
        return data, None
    from nbdserve.formats.encryption.storage import EncryptedStorage  # noqa: PLC0415
    from nbdserve.formats.luks.keys import open_volume  # noqa: PLC0415
    from nbdserve.formats.luks.layout import HEADER_BYTES  # noqa: PLC0415
    from nbdserve.formats.luks.layout import Header as LuksHeader  # noqa: PLC0415

    offset, length = header.luks_area
    stored = await storage.read(offset, min(length, HEADER_BYTES))
    luks_header = LuksHeader.parse(stored, storage.path, length)
    return EncryptedStorage(data, await open_volume(luks_header, storage, offset, options)), luks_header
