"""Drift: how much a LoRA changes the model's prediction for a prompt without the subject.

Measured on samples that the base model generates, which it predicts well. So a change there is
damage. On a training image, which the base may predict badly, a change may be what was learned.

Shapes: B items, C latent channels, H and W latent rows and columns.
"""

import math
from functools import partial

import torch
from torch import Tensor

from inference.acceleration import with_fallback
from trainer.learning import Loop, draw_noise, noisy
from trainer.monitor import untrained

STEPS = 8  # of Euler's method from noise to the base model's sample, without guidance
SIGMAS = (0.25, 0.4, 0.6, 0.75)


@torch.no_grad()
def velocity_drift(loop: Loop, prompt: str) -> float:
    """|v_adapted - v_base| / |v_base| at `SIGMAS`, on samples of the base for the same prompt.

    Uses the run's batch size, so that a compiled model is not compiled again. The prompt must be
    one of the captions of the loop's `Captions`.
    """
    family, rows = loop.family, loop.settings.batch_size
    shape = loop.samples[0].mean_CHW.shape
    text = loop.captions.features([prompt] * rows)

    def noise_BCHW(turn: int) -> Tensor:
        noises = [draw_noise(shape, loop.settings.seed, "drift", turn, row) for row in range(rows)]
        return torch.stack(noises).to(family.device)

    def velocity_BCHW(latents_BCHW: Tensor, sigma: float) -> Tensor:
        sigma_B = torch.full((rows,), sigma, device=family.device)
        call = partial(family.velocity, latents_BCHW, sigma_B, text)
        return with_fallback(family.transformer, call)

    with untrained(loop):
        sample_BCHW = noise_BCHW(0)
        for step in range(STEPS, 0, -1):
            sample_BCHW = sample_BCHW - velocity_BCHW(sample_BCHW, step / STEPS) / STEPS
        inputs = []
        for turn, sigma in enumerate(SIGMAS, start=1):
            sigma_B = torch.full((rows,), sigma, device=family.device)
            inputs.append((noisy(sample_BCHW, noise_BCHW(turn), sigma_B), sigma))
        base = [velocity_BCHW(*each) for each in inputs]
    with loop.averaged():
        adapted = [velocity_BCHW(*each) for each in inputs]
    moved = sum((a - b).square().sum().item() for a, b in zip(adapted, base, strict=True))
    whole = sum(b.square().sum().item() for b in base)
    return math.sqrt(moved / whole) if whole > 0 else math.nan
