"""The parts of XXH3-128 that let a device take most of a sum, and a host finish it to the same 16 bytes.

XXH3 (Yann Collet, https://github.com/Cyan4973/xxHash, long inputs, seed 0) keeps eight accumulators of 64 bits. Every
block of 1,024 bytes is added to them, in any order within the block, and then they are scrambled. The last block and
the last 64 bytes are treated apart: :func:`finish` does that and mixes what is left.
"""

from __future__ import annotations

import struct

BLOCK = 1024
_STRIPE = 64
_MASK = (1 << 64) - 1
PRIME32_1 = 0x9E3779B1
_PRIME64_1, _PRIME64_2 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F
START = (
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


def finish(accumulated: bytes, last_block: memoryview | bytes, length: int) -> bytes:
    """The digest of ``length`` bytes, a multiple of 1,024.

    Args:
        accumulated: the eight accumulators after all blocks but the last, 64 bytes, little-endian.
        last_block: the last 1,024 bytes.
    """
    lanes = list(struct.unpack("<8Q", accumulated))
    for stripe in range(BLOCK // _STRIPE - 1):
        _add(lanes, last_block[stripe * _STRIPE : (stripe + 1) * _STRIPE], 8 * stripe)
    _add(lanes, last_block[-_STRIPE:], len(SECRET) - _STRIPE - 7)
    low = _merged(lanes, 11, length * _PRIME64_1 & _MASK)
    high = _merged(lanes, len(SECRET) - _STRIPE - 11, ~(length * _PRIME64_2) & _MASK)
    return struct.pack(">QQ", high, low)


def _add(lanes: list[int], stripe: memoryview | bytes, secret_at: int) -> None:
    words, keys = struct.unpack("<8Q", stripe), struct.unpack_from("<8Q", SECRET, secret_at)
    for lane, (word, key) in enumerate(zip(words, keys, strict=True)):
        mixed = word ^ key
        lanes[lane ^ 1] = (lanes[lane ^ 1] + word) & _MASK
        lanes[lane] = (lanes[lane] + (mixed & 0xFFFFFFFF) * (mixed >> 32)) & _MASK


def _merged(lanes: list[int], secret_at: int, start: int) -> int:
    keys = struct.unpack_from("<8Q", SECRET, secret_at)
    total = start
    for lane in range(0, 8, 2):
        product = (lanes[lane] ^ keys[lane]) * (lanes[lane + 1] ^ keys[lane + 1])
        total += (product & _MASK) ^ (product >> 64)
    total &= _MASK
    total ^= total >> 37
    total = total * 0x165667919E3779F9 & _MASK
    return total ^ (total >> 32)
