"""Batched prompt encoding and Euler sampling, equal to `ZImagePipeline`.

Evaluation and distillation generate thousands of images, for which the pipeline's overhead per
image is too slow. A test checks that the results are equal.

B batch, C channels, H rows, W columns, L caption tokens, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2Tokenizer

from miniature.batched import batched_forward
from miniature.device import bfloat16_products
from miniature.images import to_images
from miniature.models import PIXELS, TextEncoder, Transformer, Vae
from miniature.vae import decode

CAPTION_MULTIPLE = 32


@dataclass(frozen=True)
class TextFeatures:
    """Features [B, L, D] and the mask of real tokens [B, L], L a multiple of 32."""

    text_BLD: Tensor
    mask_BL: Tensor

    def __getitem__(self, rows: slice) -> "TextFeatures":
        return TextFeatures(self.text_BLD[rows], self.mask_BL[rows])


@dataclass
class Base:
    """The parts of a loaded base. `shift` is the scheduler's.

    `forward` may be a compiled `batched_forward`, which is worth it for thousands of batches.
    """

    transformer: Transformer
    text_encoder: TextEncoder
    tokenizer: Qwen2Tokenizer
    vae: Vae
    shift: float
    forward: Callable[..., Tensor] = batched_forward


def tokenize(
    tokenizer: Qwen2Tokenizer, prompts: Sequence[str], length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, L] of the templated prompts, right-padded to a multiple of 32.

    With `length`, padded to that; raises ValueError if a prompt is longer.
    """
    texts = [f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n" for p in prompts]
    rows = tokenizer(texts, padding=False).input_ids
    longest = max(len(row) for row in rows)
    width = length or -(-longest // CAPTION_MULTIPLE) * CAPTION_MULTIPLE
    if longest > width:
        raise ValueError(f"a prompt has {longest} tokens with the template; {width} is the limit")
    pad = tokenizer.pad_token_id
    ids_BL = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BL, torch.arange(width)[None] < lengths_B[:, None]


def encode_ids(text_encoder: TextEncoder, ids_BL: Tensor, mask_BL: Tensor) -> TextFeatures:
    """The output of the second-to-last layer, as in the pipeline."""
    states = text_encoder(
        input_ids=ids_BL, attention_mask=mask_BL, output_hidden_states=True
    ).hidden_states
    return TextFeatures(states[-2], mask_BL)


@torch.no_grad()
def encode_prompts(base: Base, prompts: Sequence[str]) -> TextFeatures:
    """Features of prompts of one padded length.

    Raises ValueError if their lengths need different multiples of 32: the model does not mask the
    padding, so their images would differ from those generated separately.
    """
    ids_BL, mask_BL = tokenize(base.tokenizer, prompts)
    device = base.transformer.device
    if int(mask_BL.sum(dim=1).min()) <= ids_BL.shape[1] - CAPTION_MULTIPLE:
        raise ValueError("prompts of different padded lengths; encode them separately")
    return encode_ids(base.text_encoder, ids_BL.to(device), mask_BL.to(device))


def shifted_sigmas(steps: int, shift: float) -> Tensor:
    """The pipeline's sigmas: linspace(1, 1/steps) with the static shift, then 0."""
    linear = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    sigmas = shift * linear / (1 + (shift - 1) * linear)
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def velocity(
    base: Base,
    latents_BCHW: Tensor,
    sigma_B: Tensor,
    text: TextFeatures,
    empty: TextFeatures | None = None,
    guidance: float = 0.0,
) -> Tensor:
    """eps - x0 in float32; with `guidance` g > 0: pos + g (pos - neg), as in the pipeline."""

    def ask(latents: Tensor, sigma: Tensor, features: TextFeatures) -> Tensor:
        dtype = base.transformer.dtype
        text_BLD = features.text_BLD.to(dtype)
        out = base.forward(
            base.transformer, latents.to(dtype), 1 - sigma, text_BLD, features.mask_BL
        )
        return -out.float()

    if guidance <= 0:
        return ask(latents_BCHW, sigma_B, text)
    if empty is None:
        raise ValueError("guidance needs the features of the empty prompt")
    batch = len(latents_BCHW)
    both = TextFeatures(
        torch.cat([text.text_BLD, empty.text_BLD.expand_as(text.text_BLD)]),
        torch.cat([text.mask_BL, empty.mask_BL.expand_as(text.mask_BL)]),
    )
    positive, negative = ask(
        latents_BCHW.repeat(2, 1, 1, 1), sigma_B.repeat(2), both
    ).split(batch)  # fmt: skip
    return positive + guidance * (positive - negative)


@torch.no_grad()
def sample_latents(
    base: Base,
    noise_BCHW: Tensor,
    text: TextFeatures,
    steps: int,
    empty: TextFeatures | None = None,
    guidance: float = 0.0,
) -> Tensor:
    """Euler sampling from noise to latents."""
    sigmas = shifted_sigmas(steps, base.shift)
    x = noise_BCHW.float()
    for now, after in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        sigma_B = torch.full((len(x),), now, device=x.device)
        x = x + (after - now) * velocity(base, x, sigma_B, text, empty, guidance)
    return x


def noise_for(seeds: Sequence[int], channels: int, pixels: int = PIXELS) -> Tensor:
    """Noise of each image by its seed, independent of the batch size."""
    side = pixels // 4
    return torch.stack(
        [torch.randn(channels, side, side, generator=torch.Generator().manual_seed(seed))
         for seed in seeds]
    )  # fmt: skip


@torch.no_grad()
def generate(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    batch: int = 50,
) -> list[Image.Image]:
    """Generates one image per prompt and seed."""
    empty = encode_prompts(base, [""])
    images: list[Image.Image] = []
    for first in range(0, len(prompts), batch):
        rows = slice(first, first + batch)
        noise = noise_for(seeds[rows], base.transformer.config.in_channels)
        noise = noise.to(base.transformer.device)
        with bfloat16_products():
            text = encode_prompts(base, prompts[rows])
            latents = sample_latents(base, noise, text, steps, empty, guidance)
        images += to_images(decode(base.vae, latents))
    return images
