"""Each family does what its stock pipeline does: same text, same loss, same pictures."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from families.family import Family
from families.loading import load_family
from families.registry import BASES, UnknownBase, find_base
from inference.generation import generate
from inference.request import Request, resolve
from trainer.learning.loss import flow_loss, noisy

PROMPTS = ["a photo of a cat", "", "two red boats, one behind the other, in a harbour at dawn"]
STOCK = ["z-image-turbo", "z-image", "qwen-image", "qwen-image-2512"]


@pytest.fixture(scope="module", params=STOCK)
def pair(request: pytest.FixtureRequest, vault: Path) -> Iterator[tuple[Family, Any]]:
    """One of our families and the stock pipeline over the same files, float32."""
    base = BASES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(vault))
        family = load_family(base, torch.device("cpu"), torch.float32)
        stock = DiffusionPipeline.from_pretrained(
            vault / base.hub_id, dtype=torch.float32, tokenizer=family.prompts.tokenizer
        )
        stock.set_progress_bar_config(disable=True)
        yield family, stock


def stock_features(stock: Any, prompt: str) -> torch.Tensor:
    features = stock.encode_prompt(prompt)[0]
    return features[0]


@torch.no_grad()
def test_prompt_features_are_the_stock_pipelines(pair: tuple[Family, Any]) -> None:
    family, stock = pair
    together = family.encode_prompts(PROMPTS)
    for prompt, batched in zip(PROMPTS, together, strict=True):
        wanted = stock_features(stock, prompt)
        alone = family.encode_prompts([prompt])[0]
        assert alone.shape == wanted.shape
        torch.testing.assert_close(alone, wanted, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(batched, wanted, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_prompt_beyond_the_limit_is_cut_where_the_stock_pipeline_cuts_it(
    pair: tuple[Family, Any],
) -> None:
    family, stock = pair
    long = "word " * 700
    wanted = stock_features(stock, long)[: family.max_text_tokens]
    torch.testing.assert_close(family.encode_prompts([long])[0], wanted, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_the_loss_is_that_of_the_stock_forward(pair: tuple[Family, Any]) -> None:
    """For the same noise and sigma, as the pipeline calls its transformer in one step."""
    family, stock = pair
    text = family.encode_prompts(PROMPTS)
    shape = (len(PROMPTS), family.latent_channels, 8, 12)
    latents, noise = torch.randn(shape), torch.randn(shape)
    sigma = torch.tensor([0.05, 0.5, 0.97])
    ours = flow_loss(family, latents, noise, sigma, text)

    noised = noisy(latents, noise, sigma)
    if family.base.family == "z_image":
        out = stock.transformer(
            list(noised.unsqueeze(2)), (1000 - sigma * 1000) / 1000, text, return_dict=False
        )[0]
        velocity = -torch.stack(out).squeeze(2)
    else:
        velocity = torch.cat(
            [stock_qwen_velocity(stock, noised[i], sigma[i], text[i]) for i in range(len(text))]
        )
    wanted = torch.nn.functional.mse_loss(velocity, noise - latents)
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)


def stock_qwen_velocity(
    stock: Any, latents_CHW: torch.Tensor, sigma: torch.Tensor, text_LD: torch.Tensor
) -> torch.Tensor:
    channels, rows, columns = latents_CHW.shape
    packed = stock._pack_latents(latents_CHW[None], 1, channels, rows, columns)
    out = stock.transformer(
        hidden_states=packed,
        timestep=(sigma * 1000).expand(1) / 1000,
        encoder_hidden_states=text_LD[None],
        img_shapes=[[(1, rows // 2, columns // 2)]],
        return_dict=False,
    )[0]
    size = stock.vae_scale_factor
    return stock._unpack_latents(out, rows * size, columns * size, size).squeeze(2)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
@torch.inference_mode()
def test_a_seed_gives_the_stock_pipelines_picture(
    pair: tuple[Family, Any], guidance: float
) -> None:
    family, stock = pair
    request = Request(
        prompt="a red fox",
        negative_prompt="blur" if guidance > 1 else "",
        width=64,
        height=96,
        num_inference_steps=4,
        guidance_scale=guidance,
        seed=7,
    )
    ours = generate(family, resolve(request, family.base, family.resolution_multiple))[0]
    scale: dict[str, Any] = (
        {"guidance_scale": guidance - 1}
        if family.base.family == "z_image"
        else {"true_cfg_scale": guidance}
    )
    wanted = stock(
        prompt="a red fox",
        negative_prompt="blur" if guidance > 1 else None,
        width=64,
        height=96,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(7),
        **scale,
    ).images[0]
    assert ours.size == wanted.size == (64, 96)
    difference = np.abs(np.asarray(ours, np.int16) - np.asarray(wanted, np.int16))
    assert difference.max() <= 1  # a value that lies between two levels may round either way
    assert np.asarray(ours).std() > 1  # and it is a picture, not a flat field


@torch.no_grad()
def test_encoding_a_picture_gives_the_normalised_posterior(pair: tuple[Family, Any]) -> None:
    family, stock = pair
    pixels = torch.rand(2, 3, 64, 48) * 2 - 1
    mean, std = family.encode_images(pixels)
    assert mean.shape == std.shape == (2, family.latent_channels, *family.latent_size(48, 64))
    if family.base.family == "z_image":
        posterior = stock.vae.encode(pixels).latent_dist
        config = stock.vae.config
        wanted = (posterior.mean - config.shift_factor) * config.scaling_factor
        wanted_std = posterior.std * config.scaling_factor
    else:
        posterior = stock.vae.encode(pixels[:, :, None]).latent_dist
        centre = torch.tensor(stock.vae.config.latents_mean).view(1, -1, 1, 1)
        spread = torch.tensor(stock.vae.config.latents_std).view(1, -1, 1, 1)
        wanted = (posterior.mean[:, :, 0] - centre) / spread
        wanted_std = posterior.std[:, :, 0] / spread
    torch.testing.assert_close(mean, wanted)
    torch.testing.assert_close(std, wanted_std)
    # What the pipeline would show of those latents is what decode shows.
    assert family.decode(mean).shape == pixels.shape


def test_eight_turbo_steps_are_eight_forwards_on_the_published_grid(use_vault: Path) -> None:
    family = load_family(BASES["z-image-turbo"])
    published = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
    assert family.sigmas(8, 1024, 1024).tolist() == pytest.approx(published, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_shift_is_the_same_at_every_size_and_has_no_terminal_shift(
    steps: int, use_vault: Path
) -> None:
    """As diffusers' scheduler gives it with the settings on Qwen-Image-Lightning's card."""
    family = load_family(BASES["qwen-image"])
    card = {"use_dynamic_shifting": True, "shift_terminal": None}
    card |= {"base_shift": math.log(3), "max_shift": math.log(3)}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(family.scheduler.config, **card)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=math.log(3))
    for width, height in ((1328, 1328), (256, 512)):
        found = family.sigmas(steps, width, height, shift=3.0)
        torch.testing.assert_close(found, scheduler.sigmas)
    if steps == 8:
        published = [1, 0.955, 0.9, 0.833, 0.75, 0.643, 0.5, 0.3, 0]
        assert [round(sigma, 3) for sigma in found.tolist()] == published
    for shift in (20.0, 1e-9, 1e-300, 5e-324):
        extreme = family.sigmas(steps, 64, 64, shift)
        assert extreme.isfinite().all() and extreme[0] == 1 and extreme.diff().max() <= 0


def test_one_step_goes_from_noise_to_the_picture(use_vault: Path) -> None:
    """Qwen-Image's terminal shift would divide by zero there."""
    assert load_family(BASES["qwen-image"]).sigmas(1, 64, 64).tolist() == [1, 0]


@pytest.mark.parametrize("name", ["z-image-turbo", "qwen-image"])
def test_what_is_frozen_gets_no_gradient_and_loads_in_the_asked_type(
    name: str, use_vault: Path
) -> None:
    family = load_family(BASES[name], torch.device("cpu"), torch.bfloat16)
    for part in (family.transformer, family.text_encoder):
        assert all(p.dtype == torch.bfloat16 for p in part.parameters())
        assert not any(p.requires_grad for p in part.parameters())
    assert next(family.vae.parameters()).dtype == torch.float32


def test_every_lora_target_is_a_linear_layer_that_the_output_depends_on(
    use_vault: Path,
) -> None:
    """A target without gradient would never learn, and be shipped all the same."""
    for name in ("z-image", "qwen-image"):
        family = load_family(BASES[name])
        layers = dict(family.transformer.named_modules())
        targets = family.lora_targets()
        assert len(set(targets)) == len(targets)
        for target in targets:
            assert isinstance(layers[target], torch.nn.Linear), target
            layers[target].weight.requires_grad_(True)
        with torch.no_grad():
            text = family.encode_prompts(["a cat"])
        shape = (1, family.latent_channels, 8, 8)
        family.velocity(torch.randn(shape), torch.tensor([0.5]), text).square().sum().backward()
        dead = [t for t in targets if not layers[t].weight.grad.abs().sum() > 0]
        assert dead == []


def test_the_published_sizes_give_the_published_numbers_of_lora_layers() -> None:
    """Counted on models without storage: 30 x 7 for Z-Image, 60 x 12 - 4 for Qwen-Image."""
    from families.models.qwen_image import QwenImage
    from families.models.z_image import ZImage

    for family_class, layers, parameters in ((ZImage, 210, 6.15e9), (QwenImage, 716, 20.4e9)):
        with torch.device("meta"):
            transformer = family_class.model_class("transformer")()
        family = object.__new__(family_class)
        family.base = family_class.bases[0]
        family.transformer_config = dict(transformer.config)
        names = dict(transformer.named_modules())
        targets = family.lora_targets()
        assert len(targets) == layers
        assert all(isinstance(names[target], torch.nn.Linear) for target in targets)
        count = sum(p.numel() for p in transformer.parameters())
        assert count == pytest.approx(parameters, rel=0.01)


def test_an_unknown_base_suggests_the_nearest_known_one() -> None:
    with pytest.raises(UnknownBase, match="did you mean 'z-image-turbo'"):
        find_base("z-image-trubo")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
