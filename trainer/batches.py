"""Which samples a step trains on: shuffled epochs of batches that each come from one bucket."""

from collections.abc import Hashable, Sequence
from functools import lru_cache

import torch

from trainer.randomness import generator


class Batches:
    """Deterministic batches of sample indices, by step.

    Samples of one batch share a shape (their bucket), so they stack. Every epoch shows every
    sample once; a bucket's last batch is filled up from the same epoch's first samples.
    """

    def __init__(self, shapes: Sequence[Hashable], batch_size: int, seed: int) -> None:
        groups: dict[Hashable, list[int]] = {}
        for index, shape in enumerate(shapes):
            groups.setdefault(shape, []).append(index)
        self._groups = list(groups.values())
        self._batch_size, self._seed = batch_size, seed
        self.per_epoch = sum(-(-len(group) // batch_size) for group in self._groups)
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def at(self, step: int) -> list[int]:
        """The sample indices of a step, counted from 0."""
        epoch, position = divmod(step, self.per_epoch)
        return self._epoch(epoch)[position]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        random = generator(self._seed, "order", epoch)
        batches = []
        for group in self._groups:
            order = [group[k] for k in torch.randperm(len(group), generator=random).tolist()]
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                while len(batch) < self._batch_size:
                    batch += order[: self._batch_size - len(batch)]
                batches.append(batch)
        shuffle = torch.randperm(len(batches), generator=random).tolist()
        return [batches[k] for k in shuffle]
