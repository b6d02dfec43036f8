"""The constants of XXH3-128 that let a device take the digest of a chunk, the same 16 bytes as the library's.

XXH3 (Yann Collet, https://github.com/Cyan4973/xxHash, long inputs, seed 0) keeps eight accumulators of 64 bits. Every
block of 1,024 bytes is added to them, in any order within the block, and then they are scrambled. The last block is
not, its last stripe of 64 bytes has a key of its own, and the accumulators are mixed to two words.
"""

from __future__ import annotations

import struct

BLOCK = 1024
DIGEST, SUMS = 16, 64  # bytes: of a digest, and of what a block adds to the accumulators
_STRIPE = 64
_MASK = (1 << 64) - 1
PRIME32_1 = 0x9E3779B1
PRIME_MX1 = 0x165667919E3779F9
_PRIME64_1, _PRIME64_2 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F
_START = (
    0xC2B2AE3D,
    _PRIME64_1,
    _PRIME64_2,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x85EBCA77,
    0x27D4EB2F165667C5,
    PRIME32_1,
)
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a"
    "51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8f"
    "f8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def table_of(length: int) -> bytes:
    """All that the digest of ``length`` bytes mixes in, as rows of eight words: three of the secret's own (the key of
    stripe s begins at word s, that of scrambling at word 16), the last stripe's key, the keys of the digest's high and
    low word, what the accumulators start with, and what the high and the low word start with."""
    keys = [_words(len(SECRET) - _STRIPE - 7), _words(len(SECRET) - _STRIPE - 11), _words(11)]
    begun = [~(length * _PRIME64_2) & _MASK, length * _PRIME64_1 & _MASK]
    return SECRET + struct.pack("<40Q", *(word for key in keys for word in key), *_START, *begun, *[0] * 6)


def _words(secret_at: int) -> tuple[int, ...]:
    return struct.unpack_from("<8Q", SECRET, secret_at)
