from nbdserve.formats.crc32c import crc32c


def test_the_vectors_of_the_rfc() -> None:
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_any_buffer_will_do() -> None:
    data = bytearray(b"x123456789")
    assert crc32c(memoryview(data)[1:]) == 0xE3069283
    assert crc32c(data[1:]) == 0xE3069283
