"""Batched generation and editing, equal to `QwenImage21Pipeline`; a test checks it.

B batch, C channels, H rows, W columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2Tokenizer

from miniature.device import bfloat16_products
from miniature.images import to_images, to_tensor
from miniature.models import TextEncoder, Transformer, Vae
from miniature.qwen.batched import SYSTEM, Text, batched_forward, encode, tokenize
from miniature.qwen.models import FACTOR, PIXELS
from miniature.sampling import shifted_sigmas
from miniature.vae import decode
from miniature.vae import encode as encode_pixels


@dataclass
class QwenBase:
    """The parts of the loaded base. `shift` is the scheduler's."""

    transformer: Transformer
    text_encoder: TextEncoder
    tokenizer: Qwen2Tokenizer
    vae: Vae
    shift: float


@torch.no_grad()
def encode_prompts(
    base: QwenBase, prompts: Sequence[str], references_BCHW: Tensor | None = None
) -> Text:
    """Features of prompts, with a reference image's pixels each, or none."""
    device = base.transformer.device
    ids = tokenize(base.tokenizer, prompts, edits=references_BCHW is not None).to(device)
    system_L = torch.tensor(base.tokenizer(SYSTEM).input_ids, device=device)
    return encode(base.text_encoder, system_L, ids, references_BCHW)


@torch.no_grad()
def sample_latents(
    base: QwenBase,
    noise_BCHW: Tensor,
    steps: int,
    texts: Sequence[Text],
    guidance: float,
    reference_BCHW: Tensor | None = None,
) -> Tensor:
    """Euler steps from noise to latents. `texts` are those of the prompts and, for guidance above
    1, those of empty prompts."""
    x = noise_BCHW
    sigmas = shifted_sigmas(steps, base.shift).to(torch.float32)
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        sigma_B = torch.full((len(x),), now, device=x.device)
        given, *without = (
            batched_forward(base.transformer, x, sigma_B, each.text_BLD, each.length_B, each.place,
                            reference_BCHW).float()
            for each in texts
        )  # fmt: skip
        velocity = given if not without else without[0] + guidance * (given - without[0])
        x = x + (after - now) * velocity
    return x


@torch.no_grad()
def generate(
    base: QwenBase,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float = 1.0,
    references: Sequence[Image.Image] | None = None,
    batch: int = 50,
) -> list[Image.Image]:
    """One image per prompt and seed; with `references`, edits of these. Guidance 1 is off."""
    device, channels = base.transformer.device, base.transformer.config.in_channels
    side = PIXELS // FACTOR
    images: list[Image.Image] = []
    for first in range(0, len(prompts), batch):
        rows = slice(first, first + batch)
        noise = torch.stack(
            [torch.randn(channels, side, side, generator=torch.Generator().manual_seed(seed))
             for seed in seeds[rows]]
        ).to(device)  # fmt: skip
        pixels = None if references is None else to_tensor(references[rows]).to(device)
        with bfloat16_products():
            clean = None if pixels is None else encode_pixels(base.vae, pixels).float()
            wanted = [prompts[rows], [""] * len(noise)][: 1 + (guidance > 1)]
            texts = [encode_prompts(base, each, pixels) for each in wanted]
            latents = sample_latents(base, noise, steps, texts, guidance, clean)
        images += to_images(decode(base.vae, latents))
    return images
