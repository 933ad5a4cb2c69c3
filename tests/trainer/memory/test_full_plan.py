"""The plan of a full training, held against real steps in the backward pass."""

from functools import partial
from pathlib import Path

import pytest
import torch
from measured import of_depth

from adapters.full_weights import FullWeights, trained_names
from families.loading import load_family
from families.recomputation import recompute
from families.registry import find_base
from families.without_weights import family_without_weights
from trainer.learning.fused import FusedOptimizer
from trainer.learning.optimizers import make_optimizer
from trainer.memory.step_cost import Shape, _step, step_loads


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_plan_of_a_full_training_counts_real_steps(
    name: str, dtype: torch.dtype, use_vault: Path
) -> None:
    base, blocks, shape = find_base(name), 6, Shape(2, 1, 128, 128, 40)
    counted = of_depth(family_without_weights(base, dtype), blocks)
    planned = step_loads(counted, trained_names(counted, "auto"), shape, full=True)
    real = of_depth(load_family(base, torch.device("cpu"), dtype), blocks)
    full = FullWeights(real, trained_names(real, "auto"))
    make = partial(make_optimizer, "adafactor", rate=1e-5, weight_decay=0.0)
    optimizer = FusedOptimizer(make, full.parameters(), seed=0)
    for step, recomputed in enumerate((0, 0, 3, blocks)):
        recompute(real, recomputed / blocks)
        optimizer.begin(step)
        meter = _step(real, full.parameters(), shape)
        optimizer.step()
        if step:  # the first makes tables and states
            peak = max(meter.early or 0, meter.peak)
            assert planned[recomputed].bytes == pytest.approx(peak, rel=0.05)
    assert planned[-1].bytes <= planned[3].bytes <= planned[0].bytes
