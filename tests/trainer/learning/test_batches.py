"""Every image is seen equally often, whatever its shape, and a step's batch depends on it alone."""

import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch

from trainer.learning.batches import Batches, warn_repeats
from trainer.learning.samples import Sample

# How many samples each bucket has.
DATASETS = {
    "one odd": [9, 1],
    "several odd": [17, 1, 1, 2],
    "all different": [1] * 7,
    "one bucket": [10],
    "one sample": [1],
    "large and small": [31, 5, 3],
}


def shapes(counts: list[int]) -> list[int]:
    return [bucket for bucket, count in enumerate(counts) for _ in range(count)]


@pytest.mark.parametrize("counts", DATASETS.values(), ids=DATASETS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_sample_is_seen_equally_often(counts: list[int], size: int) -> None:
    buckets = shapes(counts)
    batches = Batches(buckets, size, seed=3)
    assert batches.period * size == batches.passes * len(buckets)
    seen, trained = Counter[int](), Counter[int]()
    for step in range(2 * batches.period):
        batch = batches.at(step)
        bucket = buckets[batch[0]]
        assert len(batch) == size and {buckets[index] for index in batch} == {bucket}
        if counts[bucket] >= size:
            assert len(set(batch)) == size
        else:
            times = Counter(batch).values()
            assert len(times) == counts[bucket] and max(times) - min(times) <= 1
        seen.update(batch)
        trained[bucket] += 1
        for number, count in enumerate(counts):
            share = count / len(buckets)
            off = trained[number] - share * (step + 1)
            assert abs(off) <= 1 + share * len(counts)
            times = [seen[index] for index in range(len(buckets)) if buckets[index] == number]
            assert max(times) - min(times) <= 1
        if step + 1 == batches.period:
            assert set(seen.values()) == {batches.passes}
    assert set(seen.values()) == {2 * batches.passes}


def test_a_sample_is_seen_as_often_as_its_repeats_say() -> None:
    repeats = [10, 4, 4, 6]
    batches = Batches([0, 0, 1, 1], 2, seed=3, repeats=repeats)
    assert batches.period == 12 // 2 * batches.passes  # only their relation counts
    seen = Counter(index for step in range(2 * batches.period) for index in batches.at(step))
    assert [seen[k] for k in range(4)] == [n * batches.passes for n in repeats]
    equal = Batches([0, 0, 1], 2, seed=3, repeats=[7, 7, 7])
    plain = Batches([0, 0, 1], 2, seed=3)
    assert [equal.at(k) for k in range(9)] == [plain.at(k) for k in range(9)]


@pytest.mark.parametrize("size", [4, 8])
def test_one_odd_image_has_its_fair_share_of_a_training(size: int) -> None:
    """Nine squares and one wide image: a tenth, not a quarter or a third."""
    batches = Batches(shapes([9, 1]), size, seed=0)
    seen = Counter(index for step in range(1000) for index in batches.at(step))
    assert all(count / (1000 * size) == pytest.approx(0.1, abs=0.002) for count in seen.values())


def test_a_batch_depends_on_its_step_alone() -> None:
    first = [Batches(shapes([9, 4, 1]), 4, seed=5).at(step) for step in range(50)]
    again = Batches(shapes([9, 4, 1]), 4, seed=5)
    assert [again.at(step) for step in reversed(range(50))] == first[::-1]
    assert [Batches(shapes([9, 4, 1]), 4, seed=6).at(step) for step in range(50)] != first
    period = again.period
    assert first[:period] != first[period : 2 * period]


def sample(name: str, height: int, width: int) -> Sample:
    return Sample(name, "", torch.zeros(4, height, width), torch.zeros(4, height, width))


def test_images_that_are_few_of_their_size_are_named(caplog: pytest.LogCaptureFixture) -> None:
    samples = [sample(f"{number}.png", 8, 8) for number in range(6)]
    samples += [sample("wide.png", 6, 10), sample("a.png", 10, 6), sample("b.png", 10, 6)]
    with caplog.at_level(logging.WARNING):
        warn_repeats(samples, 4, vae_factor=8)
    assert "only 1 at 80x48: wide.png (1 batch in 9)" in caplog.text
    assert "only 2 at 48x80: a.png, b.png (1 batch in 4.5)" in caplog.text
    assert "64x64" not in caplog.text
    caplog.clear()
    # Three crops of each of two images count as much as two images that fit, which have repeats.
    cut = [sample(name, 6, 10) for name in ("cut.png", "too.png") for _ in range(3)]
    fit = [replace(sample(f"{number}.png", 8, 8), repeats=3) for number in range(2)]
    warn_repeats(cut + fit, 4, vae_factor=8)
    assert "only 2 at 64x64: 0.png, 1.png (1 batch in 2)" in caplog.text
    caplog.clear()
    warn_repeats(samples, 1, vae_factor=8)
    assert not caplog.records
