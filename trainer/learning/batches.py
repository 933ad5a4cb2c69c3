"""Samples batches by step: each from one bucket, with all samples as often as they should be."""

import logging
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import TypeVar

import torch

from trainer.data import listed
from trainer.learning.randomness import generator
from trainer.learning.samples import Sample

log = logging.getLogger(__name__)

T = TypeVar("T")


class Batches:
    """Deterministic batches of sample indices, by step.

    Samples of one batch have the same shape (their bucket), so they stack; every batch has
    `batch_size` samples. A bucket with n of N samples gets n of N batches, spread evenly over the
    run, and its batches go through its samples in shuffled passes. So:

    - After `period` steps every sample was used equally often (`passes` times).
    - Before that, a bucket of share p among g buckets is within 1 + p g batches of its share, and
      its samples were used equally often, plus or minus one.
    - No batch contains a sample twice unless its bucket has fewer than `batch_size`. Then it
      contains all of them, with counts that differ by at most one; such batches are rarer.

    The batch of a step depends only on seed, samples, batch size and step. Several processes share
    one batch, an image at several resolutions counts as several samples, and held-out images are
    not samples. A sample with n repeats counts as n samples.
    """

    def __init__(
        self,
        shapes: Sequence[Hashable],
        batch_size: int,
        seed: int,
        repeats: Sequence[int] | None = None,
    ) -> None:
        """repeats: how often each sample is used, relative to the others; None: all equally."""
        repeats = repeats or [1] * len(shapes)
        common = math.gcd(*repeats)
        self._samples = [k for k, count in enumerate(repeats) for _ in range(count // common)]
        shapes = [shapes[sample] for sample in self._samples]
        self._groups = list(_grouped(shapes).values())
        self._batch_size, self._seed = batch_size, seed
        # The smallest number of passes that gives whole batches in every bucket.
        common = math.gcd(batch_size, *(len(group) for group in self._groups))
        self.passes = batch_size // common
        self.period = self.passes * len(shapes) // batch_size
        self._period = lru_cache(maxsize=2)(self._shuffled)

    def at(self, step: int) -> list[int]:
        """The sample indices of a step, counted from 0."""
        number, position = divmod(step, self.period)
        return [self._samples[k] for k in self._period(number)[position]]

    def _shuffled(self, number: int) -> list[list[int]]:
        """The batches of a period."""
        random = generator(self._seed, "order", number)
        placed = []
        for group in self._groups:
            batches = self._batches(group, random)
            # One batch in each of len(batches) equal intervals of the period.
            starts = torch.rand(len(batches), generator=random, dtype=torch.float64).tolist()
            placed += [
                ((k + start) / len(batches), batch)
                for k, (start, batch) in enumerate(zip(starts, batches, strict=True))
            ]
        return [batch for _, batch in sorted(placed, key=lambda each: each[0])]

    def _batches(self, group: Sequence[int], random: torch.Generator) -> list[list[int]]:
        """The bucket's batches of one period."""
        stream: list[int] = []
        for _ in range(self.passes):
            order = [group[k] for k in torch.randperm(len(group), generator=random).tolist()]
            # An incomplete batch is filled first with the samples that it contains least often.
            begun = Counter(stream[len(stream) - len(stream) % self._batch_size :])
            wanted = -begun.total() % self._batch_size
            first = sorted(order, key=begun.__getitem__)[:wanted]
            taken = set(first)
            order = first + [each for each in order if each not in taken]
            stream += order
        size = self._batch_size
        return [stream[start : start + size] for start in range(0, len(stream), size)]


def warn_repeats(samples: Sequence[Sample], batch_size: int, vae_factor: int) -> None:
    """Warns of images whose bucket is smaller than a batch, which then contains them repeatedly."""
    lines = []
    total = sum(sample.repeats for sample in samples)
    for shape, group in _grouped([sample.mean_CHW.shape for sample in samples]).items():
        if len(group) < batch_size:
            few = f"only {len(group)}"
            size = f"{shape[2] * vae_factor}x{shape[1] * vae_factor}"
            found = [samples[index] for index in group]
            images = listed([each.name + " (mirrored)" * each.mirrored for each in found])
            share = f"1 batch in {total / sum(each.repeats for each in found):.3g}"
            lines.append(f"{few} at {size}: {images} ({share})")
    if lines:
        log.warning(
            "some sizes have fewer images than batch_size %d, so a batch repeats them. No image is "
            "used more often because of it:\n  %s",
            *(batch_size, "\n  ".join(lines)),
        )


def _grouped(shapes: Sequence[T]) -> dict[T, list[int]]:
    """Indices by shape, in the order of their first occurrence."""
    groups: dict[T, list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    return groups
