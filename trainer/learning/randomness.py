"""Counter-based randomness: random numbers depend only on (seed, purpose, counters).

So the random numbers of a step do not depend on earlier ones, and a resumed run is equal to an
uninterrupted one.
"""

import hashlib

import torch


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator for one purpose, such as `generator(seed, "noise", step, sample)`."""
    text = f"{seed}/{purpose}/{'/'.join(map(str, counters))}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
