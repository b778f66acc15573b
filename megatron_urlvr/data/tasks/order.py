"""A seeded order of 0..n-1 that is computed one number at a time, never listed."""

import random
from collections.abc import Iterator

ROUNDS = 4
_MASK = (1 << 64) - 1


def seeded_order(n: int, seed: str) -> Iterator[int]:
    """The numbers 0..n-1, each once, in an order that `seed` decides.

    A Feistel network permutes the next power of four, and numbers beyond `n` are walked through (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002, cycle walking). No list is kept, so `n` may be 10^18.
    """
    if n < 1:
        return
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = [random.Random(f"{seed}/{i}").getrandbits(64) | 1 for i in range(ROUNDS)]
    for index in range(n):
        value = index
        while True:
            left, right = value >> half, value & low
            for key in keys:
                mixed = ((right + key) * key) & _MASK
                mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & _MASK
                left, right = right, left ^ ((mixed >> 32) & low)
            value = left << half | right
            if value < n:
                break
        yield value
