"""Only the white part of a mask is generated, as in diffusers' inpainting pipelines."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from families.loading import load_family
from families.registry import BASES
from inference.generation import generate
from inference.images import to_mask, to_pixels
from inference.inputs import GenerationInputs
from inference.request import Request, resolve

SIZE = {"width": 64, "height": 48}
PIPELINES = {
    "z-image-turbo": ("z_image.pipeline_z_image_inpaint", "ZImageInpaintPipeline"),
    "qwen-image": ("qwenimage.pipeline_qwenimage_inpaint", "QwenImageInpaintPipeline"),
}


def stripes() -> Image.Image:
    rows, columns = np.mgrid[0:48, 0:64]
    waves = [np.sin(columns / 9), np.cos(rows / 7), np.sin((rows + columns) / 11)]
    return Image.fromarray((np.stack(waves, -1) * 100 + 128).astype(np.uint8))


def mask(*box: int) -> Image.Image:
    """White in the box."""
    black = Image.new("RGB", (64, 48))
    black.paste("white", box)  # type: ignore[arg-type]
    return black


@pytest.mark.parametrize("name", PIPELINES)
@torch.inference_mode()
def test_the_image_is_the_stock_pipelines_and_the_rest_stays(
    name: str, use_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(BASES[name], torch.device("cpu"), torch.float32)
    whole_cells = mask(16, 8, 48, 32)

    def ours(masked: Image.Image | None) -> np.ndarray:
        given: dict[str, Any] = {"prompt": "a photo of a cat", "seed": 3, "prompt_strength": 0.8}
        given |= {"num_inference_steps": 5, "guidance_scale": 1, "image": stripes(), **SIZE}
        request = Request(**given, mask=masked)
        resolved = resolve(request, family.base, family.resolution_multiple)
        [image] = generate(family, resolved, {}, request.image, mask=request.mask)
        return np.asarray(image, np.int16)

    module_name, class_name = PIPELINES[name]
    module = importlib.import_module(f"diffusers.pipelines.{module_name}")
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    stock = getattr(module, class_name).from_pretrained(
        use_vault / family.base.hub_id,
        torch_dtype=torch.float32,
        tokenizer=family.prompts.tokenizer,
    )
    stock.set_progress_bar_config(disable=True)
    off = {"guidance_scale": 0.0} if name == "z-image-turbo" else {"true_cfg_scale": 1.0}
    theirs = stock(
        "a photo of a cat",
        image=stripes(),
        mask_image=whole_cells.convert("L"),
        strength=0.8,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(3),
        **SIZE,
        **off,
    ).images[0]
    inpainted = ours(whole_cells)
    assert np.abs(inpainted - np.asarray(theirs, np.int16)).max() <= 1

    # A white pixel makes its whole latent white; white everywhere is image to image.
    assert np.array_equal(ours(mask(17, 9, 41, 25)), inpainted)
    plain = ours(None)
    assert np.array_equal(ours(mask(0, 0, 64, 48)), plain)
    # The other latents are exactly the image's.
    clean, _ = family.encode_images(to_pixels(stripes(), 64, 48))
    decode, decoded = family.decode, []

    def noted(latents_BCHW: torch.Tensor) -> torch.Tensor:
        decoded.append(latents_BCHW)
        return decode(latents_BCHW)

    monkeypatch.setattr(family, "decode", noted)
    ours(whole_cells)
    same = (decoded[0] == clean).all(1)[0]
    assert not same[1:4, 2:6].any() and same.sum() == 6 * 8 - 3 * 4


def test_a_mask_that_cannot_be_used_is_refused() -> None:
    with pytest.raises(ValueError, match="mask needs an image"):
        GenerationInputs(prompt="x", mask="mask.png")
    with pytest.raises(ValueError, match="mask is 64x48, but image is 32x32; make both the same"):
        Request(prompt="x", image=Image.new("RGB", (32, 32)), mask=mask(0, 0, 9, 9))
    with pytest.raises(ValueError, match="mask is black everywhere"):  # before a model is loaded
        Request(prompt="x", image=stripes(), mask=mask(0, 0, 0, 0), **SIZE)
    with pytest.raises(ValueError, match="mask is black everywhere"):  # after the crop
        to_mask(mask(0, 0, 4, 48), 48, 48)
