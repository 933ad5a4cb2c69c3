"""Qwen-Image-2.1 reads reference images as diffusers' QwenImage21Pipeline."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from PIL import Image
from stock_processor import StockProcessor
from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3VLForConditionalGeneration,
)
from vault.models import QWEN_IMAGE_21_SIGMAS, write_qwen_image_21

from families.base import Base
from families.family import Family
from families.loading import load_family
from families.registry import BASES
from inference.generation import generate
from inference.request import Request, resolve
from inference.text_cache import TextCache

CPU = torch.device("cpu")
BASE, TURBO = (BASES[name] for name in ("qwen-image-2.1", "qwen-image-2.1-turbo"))
PROMPT = "put <zwx> of <image1> on the table"
EDGE = 80  # of the square with as many pixels as a reference image


def image(width: int, height: int, phase: float) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(columns / 9 + phase), np.cos(rows / 7), np.sin((rows + columns) / 11 - phase)]
    return Image.fromarray((np.stack(waves, -1) * 100 + 128).astype(np.uint8))


IMAGES = [image(97, 61, 0.0), image(150, 41, 1.0), image(50, 111, 2.0)]


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_qwen_image_21(tmp_path_factory.mktemp("edit21"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(folder))
        patch.setattr(Base, "reference_resolution", EDGE)
        yield folder


def family_of(base: Base) -> Family:
    return load_family(base, CPU, torch.float32)


def stock_of(folder: Path, **options: Any) -> Any:
    """The pipeline, with the token <zwx> in its tokenizer."""
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "processor")
    tokenizer.add_tokens(["<zwx>"])
    images = Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    pipeline: Any = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLQwenImage21.from_pretrained(folder / "vae"),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder"),
        processor=StockProcessor(tokenizer, images),  # type: ignore[arg-type]
        transformer=QwenImage21Transformer2DModel.from_pretrained(folder / "transformer"),
        **options,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("base", "count", "guidance", "size"),
    [(BASE, 1, 1.0, {}), (BASE, 3, 3.5, {"width": 64, "height": 96}), (TURBO, 2, 1.0, {})],
)
@torch.inference_mode()
def test_features_velocities_and_image_are_the_stock_pipelines(
    base: Base,
    count: int,
    guidance: float,
    size: dict[str, int],
    vault: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a placeholder token, whose vector is the stock tokenizer's new row, and whatever the
    stock transformer gets at the slots of images."""
    turbo, images, steps = base is TURBO, IMAGES[-count:], 8 if base is TURBO else 3
    options = {"sample_sigmas": QWEN_IMAGE_21_SIGMAS} if turbo else {}
    family, stock = family_of(base), stock_of(vault / base.hub_id, **options)
    row = stock.processor.tokenizer.convert_tokens_to_ids("<zwx>")
    vectors = {"<zwx>": stock.text_encoder.get_input_embeddings().weight[row][None].clone()}
    ours, theirs, text = [], [], []
    velocity, forward = family.edit_velocity, stock.transformer.forward

    def noted(*given: Any, **named: Any) -> torch.Tensor:
        ours.append(velocity(*given, **named))
        return ours[-1]

    def noted_stock(**given: Any) -> Any:
        features = given["encoder_hidden_states"]
        slots = given["img_mask"][:, : features.shape[1]]
        text.append(features[~slots])
        [out] = forward(
            **given | {"encoder_hidden_states": features.masked_fill(slots[..., None], 9.0)}
        )
        _, rows, columns = given["img_shapes"][0][-1]
        target = out[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        theirs.append(target)
        return (out,)

    monkeypatch.setattr(family, "edit_velocity", noted)
    monkeypatch.setattr(stock.transformer, "forward", noted_stock)
    negative = "blur" if guidance > 1 else ""
    request = Request(
        prompt=PROMPT,
        negative_prompt=negative,
        reference_images=tuple(images),
        num_inference_steps=steps,
        guidance_scale=guidance,
        seed=7,
        **size,
    )
    resolved, cache = resolve(request, family.base, family.resolution_multiple), TextCache()
    [found] = generate(family, resolved, vectors, texts=cache, reference_images=images)
    [wanted] = stock(
        image=list(images),
        prompt=PROMPT,
        negative_prompt=negative or None,
        true_cfg_scale=guidance,
        num_inference_steps=steps,
        output_resolution=EDGE,
        generator=torch.Generator().manual_seed(7),
        use_kv_cache=False,
        **size,
    ).images
    references = family.encode_references(images)
    for prompt, other in zip([PROMPT, *[negative] * (guidance > 1)], text, strict=False):
        mine = family.encode_edit(prompt, references, vectors)
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
    assert len(ours) == len(theirs) == steps * (2 if guidance > 1 else 1)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert (found.size, found.mode) == (wanted.size, wanted.mode)
    difference = np.abs(np.asarray(found, np.int16) - np.asarray(wanted, np.int16))
    assert difference.max() <= 1 and np.asarray(found).std() > 1
    if size:
        return
    [again] = generate(family, resolved, vectors, texts=cache, reference_images=images)
    assert again == found  # with the features of the cache
    [other] = generate(family, resolved, vectors, texts=cache, reference_images=IMAGES[:count])
    assert other != found


def test_an_edit_learns_the_token_and_every_layer_in_every_mode(vault: Path) -> None:
    """Plain, recomputed, and compiled: the same velocity and gradients."""
    family = family_of(BASE)
    targets = [family.transformer.get_submodule(each) for each in family.lora_targets()]
    with torch.no_grad():
        references = family.encode_references(IMAGES[:2])
    vectors = {"<zwx>": (torch.randn(2, family.text_width) / 50).requires_grad_()}
    learned = [vectors["<zwx>"], *(each.weight.requires_grad_() for each in targets)]
    latents, sigma = torch.randn(2, family.latent_channels, 4, 6), torch.tensor([0.2, 0.9])

    def gradients() -> list[torch.Tensor]:
        text = [family.encode_edit(each, references, vectors) for each in (PROMPT, "one <zwx>")]
        velocity = family.edit_velocity(latents, sigma, text, references)
        assert velocity.shape == latents.shape
        alone = family.edit_velocity(latents[1:], sigma[1:], text[1:], references)
        torch.testing.assert_close(velocity[1:], alone, atol=1e-5, rtol=1e-4)
        return [velocity, *torch.autograd.grad(velocity.square().sum(), learned)]

    wanted = gradients()
    assert all(each.abs().sum() > 0 for each in wanted)
    recompute(family, 1.0)
    recomputed = gradients()
    recompute(family, 0.0)
    compile_blocks(family.transformer, backend="eager")
    compile_text_encoder(family, backend="eager")
    for found in (recomputed, gradients()):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
