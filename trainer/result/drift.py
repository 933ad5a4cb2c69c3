"""Drift: how much a LoRA changes the model's predictions for prompts without the subject.

Measured on the base model's own way from noise to an image, so without any data, for prompts that
no run is trained on. On a training image, a change may be what was learned; here it is damage.

Shapes: B items, C latent channels, H and W latent rows and columns.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from inference.acceleration import with_fallback
from trainer.learning import Loop, draw_noise, references_of, velocity
from trainer.monitor import untrained
from trainer.settings import Settings, sort_prompts

# Not among the prompts of preservation, by their name (`Base.preservation_prompts`).
PROMPTS = {
    "general": (
        "a photo of a man with a beard repairing a bicycle in a workshop",
        "a black horse standing in a snowy field",
        "a bowl of tomato soup on a wooden table",
        "an old lighthouse on a cliff during a storm",
        "a red sports car parked in front of a brick wall",
        "a close-up of a woman's face with freckles, soft light",
        "a watercolor painting of a sailing boat on a lake",
        "a child with a yellow umbrella walking through a city in the rain",
    ),
    "shapes": (
        "a photo of a medium red circle in the middle of a meadow",
        "a blue square at the left in the desert, small",
        "one green star under a night sky, large",
        "a yellow heart and a white circle beside it in the snow",
        "a striped purple triangle at the right by the sea",
        "an orange ring in the middle of a plain room",
        "a dotted pink square and a black star beside it on grass",
        "a picture of a tiny white triangle at the left on sand",
    ),
}
# Of runs on pairs: other edits of the first pair's control images.
EDITS = (
    "turn the day into night",
    "add falling snow",
    "make it a pencil drawing",
    "remove the background and put a plain grey wall there",
    "change the season to autumn",
    "show it from the left side",
    "make the colors black and white",
    "add a red balloon in the upper right corner",
)
BATCHES = 4  # at most, so that the measurement takes as long as 11 steps of a run
POINTS = 4  # of Euler's method without guidance: sigma 1, 0.75, 0.5 and 0.25


def drift_prompts(settings: Settings) -> list[str]:
    """The prompts to measure drift with: none contains the subject."""
    prompts = EDITS if settings.pairs else PROMPTS[settings.base.preservation_prompts]
    usable, _ = sort_prompts(prompts, settings)
    return usable[: BATCHES * settings.batch_size]


@torch.no_grad()
def velocity_drift(loop: Loop, prompts: Sequence[str]) -> float:
    """|v_adapted - v_base| / |v_base| over the prompts and sigmas.

    Uses the run's batch size, so that a compiled model is not compiled again. The prompts must be
    captions of the loop's `Captions`, of pairs with the first sample's references. Raises
    ValueError if there are none.
    """
    if not prompts:
        raise ValueError("all prompts contain the subject")
    family, rows = loop.family, loop.settings.batch_size
    shape = loop.samples[0].mean_CHW.shape
    references = references_of(loop.samples[:1]) * rows

    def velocity_BCHW(latents_BCHW: Tensor, sigma: float, batch: Sequence[str]) -> Tensor:
        sigma_B = torch.full((rows,), sigma, device=family.device)
        text = loop.captions.features(batch, references)
        call = partial(velocity, family, latents_BCHW, sigma_B, text, references)
        return with_fallback(family.transformer, call)

    def batches() -> Iterator[list[str]]:
        for first in range(0, len(prompts), rows):
            yield [prompts[(first + row) % len(prompts)] for row in range(rows)]

    inputs, base = [], []
    with untrained(loop):
        for number, batch in enumerate(batches()):
            noises = [
                draw_noise(shape, loop.settings.seed, "drift", number, row) for row in range(rows)
            ]
            latents_BCHW = torch.stack(noises).to(family.device)
            for point in range(POINTS, 0, -1):
                inputs.append((latents_BCHW, point / POINTS, batch))
                base.append(velocity_BCHW(*inputs[-1]))
                latents_BCHW = latents_BCHW - base[-1] / POINTS
    with loop.averaged():
        adapted = [velocity_BCHW(*each) for each in inputs]
    moved = sum((a - b).square().sum().item() for a, b in zip(adapted, base, strict=True))
    whole = sum(b.square().sum().item() for b in base)
    return math.sqrt(moved / whole) if whole > 0 else math.nan
