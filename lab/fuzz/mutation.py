"""Mutates bytes at random, the same way for the same seed: a fuzzer for where none is installed."""

import random
from collections.abc import Sequence

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1)
MOST_CHANGES = 4


def mutated(seeds: Sequence[bytes], chance: random.Random) -> bytes:
    """One of the seeds with one to four changes; the first of its bytes mostly stays."""
    content = bytearray(chance.choice(seeds))
    for _ in range(chance.randint(1, MOST_CHANGES)):
        at = chance.randrange(min(1, len(content)), len(content) + 1)
        length = min(chance.choice((1, 2, 4, 8, 32, 256)), len(content) - at)
        match chance.randrange(7):
            case 0 if at < len(content):
                content[at] ^= 1 << chance.randrange(8)
            case 1:
                content[at : at + length] = chance.randbytes(length)
            case 2:
                del content[at : at + length]
            case 3:
                content[at:at] = content[at : at + length] * chance.choice((1, 2, 50))
            case 4:
                size = chance.choice((1, 2, 4, 8))
                number = chance.choice(NUMBERS) & ((1 << 8 * size) - 1)
                content[at : at + size] = number.to_bytes(size, chance.choice(("little", "big")))
            case 5:
                del content[at:]
            case _:
                other = chance.choice(seeds)
                start = chance.randrange(len(other) + 1)
                content[at : at + length] = other[start : start + chance.choice((length, 64))]
    return bytes(content)
