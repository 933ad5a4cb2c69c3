"""Generates the images of a resolved request."""

from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from families.base import Base
from families.family import Family
from families.references import References
from inference.images import to_images, to_mask, to_pixels
from inference.request import ResolvedRequest
from inference.sampling import FAST_GUIDED_SHARE, Kept, add_noise, sample
from inference.text_cache import TextCache


def generate(
    family: Family,
    resolved: ResolvedRequest,
    vectors: Mapping[str, Tensor] | None = None,
    image: Image.Image | None = None,
    texts: TextCache | None = None,
    mask: Image.Image | None = None,
    reference_images: Sequence[Image.Image] = (),
    references: References | None = None,
) -> list[Image.Image]:
    """Generates the images of a resolved request, one after another.

    Each image depends only on its seed, not on the number of images. With an `image`, the first
    steps are skipped, and the others start from the image with noise added. With a `mask`, only
    its white part is generated, in whole latents; the others are the image's. `reference_images`
    are an editing model's; `references` are such images encoded before, on the device.
    """
    texts = texts or TextCache()
    if reference_images:
        references = family.encode_references(reference_images)
    text = [texts.encode(family, resolved.prompt, vectors or {}, references)]
    negative = None
    if resolved.guidance_scale > 1:
        without = resolved.negative_prompt or family.empty_prompt
        negative = [texts.encode(family, without, vectors or {}, references)]
    sigmas = family.sigmas(resolved.steps, resolved.width, resolved.height, resolved.shift)
    sigmas = sigmas[resolved.first_step :]
    share = FAST_GUIDED_SHARE if resolved.go_fast else 1.0
    clean_BCHW = mask_11HW = None
    if image is not None and resolved.prompt_strength is not None:
        size = resolved.width, resolved.height
        clean_BCHW, _ = family.encode_images(to_pixels(image, *size))
        if mask is not None:
            mask_11HW = F.max_pool2d(to_mask(mask, *size), family.vae_factor)
    images = []
    for seed in resolved.seeds:
        start_BCHW, kept = family.initial_noise([seed], resolved.width, resolved.height), None
        if clean_BCHW is not None:
            clean_BCHW = clean_BCHW.to(start_BCHW)
            if mask_11HW is not None:
                kept = Kept(clean_BCHW, start_BCHW, mask_11HW.to(start_BCHW))
            start_BCHW = add_noise(clean_BCHW, start_BCHW, sigmas[0])
        latents_BCHW = sample(
            family,
            start_BCHW,
            sigmas,
            text,
            negative,
            resolved.guidance_scale,
            share,
            kept,
            references,
        )
        images += to_images(family.decode(latents_BCHW))
    return images


def describe(resolved: ResolvedRequest, base: Base) -> str:
    """All settings of a generation on one line, for the log."""
    settings = ", ".join(
        f"{field.name} {getattr(resolved, field.name)!r}"
        for field in fields(resolved)
        if getattr(resolved, field.name) not in ("", None, False)
    )
    return f"{base.name}: {settings}"


@torch.inference_mode()
def generate_once(family: Family, width: int, height: int, guidance_scale: float) -> None:
    """Runs one step of this size, so that kernels are compiled for it."""
    resolved = ResolvedRequest(
        prompt="a photo",
        negative_prompt="",
        width=width,
        height=height,
        steps=1,
        guidance_scale=guidance_scale,
        seeds=(0,),
    )
    generate(family, resolved)
