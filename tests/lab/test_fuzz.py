"""Every reader of what strangers send gives a result or its own error, whatever the bytes.

A short run of `lab.fuzz.harnesses`, always the same; `make fuzz` is the long one, guided by
coverage.
"""

import random
import warnings
from pathlib import Path

import pytest

from lab.fuzz import NAMES
from lab.fuzz.harnesses import HARNESSES
from lab.fuzz.mutation import mutated

RUNS = {
    "dataset": 400,
    "picture": 600,
    "table": 800,
    "weights": 600,
    "config": 300,
    "caption": 600,
    "checkpoint": 800,
}


def test_every_harness_has_its_turn() -> None:
    assert [*HARNESSES] == [*NAMES]


@pytest.mark.parametrize("name", HARNESSES)
def test_whole_input_is_read(name: str) -> None:
    for number, seed in enumerate(HARNESSES[name].seeds()):
        assert HARNESSES[name].run(seed), f"seed {number} is refused"


@pytest.mark.parametrize("name", HARNESSES)
def test_mutated_input_is_read_or_refused_in_order(name: str, tmp_path: Path) -> None:
    chance, seeds = random.Random(name), HARNESSES[name].seeds()
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(RUNS[name]):
            data = mutated(seeds, chance)
            try:
                outcomes.append(HARNESSES[name].run(data))
            except BaseException as error:
                error.add_note(f"input {number} of {name}: {data!r}")
                raise
    assert {*outcomes} == {True, False}  # the mutations are neither too wild nor too tame
