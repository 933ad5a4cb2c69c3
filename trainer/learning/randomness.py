"""Counter-based randomness: random numbers depend only on (seed, purpose, counters).

So the random numbers of a step do not depend on earlier ones, and a resumed run is equal to an
uninterrupted one.
"""

import hashlib

import torch


def seed_of(seed: int, purpose: str, *counters: int) -> int:
    """The seed of one purpose, for a generator on any device."""
    text = f"{seed}/{purpose}/{'/'.join(map(str, counters))}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator for one purpose, such as `generator(seed, "noise", step, sample)`."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, *counters))
