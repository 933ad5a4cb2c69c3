"""Counter-based randomness: every draw depends on (seed, purpose, counters) and nothing else.

So a step sees the same noise however training came to it, and a resumed run equals an
uninterrupted one.
"""

import hashlib

import torch


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator for one draw, such as `generator(seed, "noise", step, sample)`."""
    text = f"{seed}/{purpose}/{'/'.join(map(str, counters))}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
