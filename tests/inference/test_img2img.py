"""A picture to start from: how much of it stays, and that the stock pipelines agree."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from families.family import Family
from families.loading import load_family
from families.registry import BASES
from inference.generation import generate
from inference.images import BrokenImage, read_image, to_images, to_pixels
from inference.request import Request, resolve

SIZE = {"width": 64, "height": 48}
PIPELINES = {
    "z-image-turbo": ("z_image.pipeline_z_image_img2img", "ZImageImg2ImgPipeline"),
    "qwen-image": ("qwenimage.pipeline_qwenimage_img2img", "QwenImageImg2ImgPipeline"),
}


@pytest.fixture(scope="module", params=PIPELINES)
def family(request: pytest.FixtureRequest, vault: Path) -> Iterator[Family]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(vault))
        yield load_family(BASES[request.param], torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Soft stripes, wider than high."""
    rows, columns = np.mgrid[0:96, 0:128]
    waves = [np.sin(columns / 9), np.cos(rows / 7), np.sin((rows + columns) / 11)]
    return Image.fromarray((np.stack(waves, -1) * 100 + 128).astype(np.uint8))


@torch.inference_mode()
def pictures(family: Family, **options: Any) -> np.ndarray:
    given = {"prompt": "a photo of a cat", "seed": 3, "num_inference_steps": 5, **SIZE, **options}
    request = Request(**given)
    resolved = resolve(request, family.base, family.resolution_multiple)
    return np.stack(
        [np.asarray(each, np.int16) for each in generate(family, resolved, {}, request.image)]
    )


@pytest.mark.parametrize("strength", [0.3, 0.8])
def test_the_picture_is_the_stock_pipelines(
    family: Family, image: Image.Image, strength: float, vault: Path, monkeypatch: Any
) -> None:
    """Its latents taken at their mean, as ours are, so that the noise is the same."""
    module_name, class_name = PIPELINES[family.base.name]
    module = importlib.import_module(f"diffusers.pipelines.{module_name}")
    monkeypatch.setattr(module, "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    stock = getattr(module, class_name).from_pretrained(
        vault / family.base.hub_id,
        torch_dtype=torch.float32,
        tokenizer=family.prompts.tokenizer,
    )
    stock.set_progress_bar_config(disable=True)
    off = {"guidance_scale": 0.0} if family.base.family == "z_image" else {"true_cfg_scale": 1.0}
    theirs = stock(
        "a photo of a cat",
        image=image.resize((64, 48), Image.Resampling.LANCZOS),
        strength=strength,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(3),
        **SIZE,
        **off,
    ).images[0]
    ours = pictures(family, image=image, prompt_strength=strength, guidance_scale=1)[0]
    assert np.abs(ours - np.asarray(theirs, np.int16)).max() <= 1


def test_at_strength_1_nothing_is_left_of_the_image(family: Family, image: Image.Image) -> None:
    without = pictures(family)
    assert np.array_equal(pictures(family, image=image, prompt_strength=1), without)
    assert not np.array_equal(pictures(family, image=image, prompt_strength=0.8), without)


@torch.inference_mode()
def test_at_strength_0_the_image_comes_back_as_the_vae_knows_it(
    family: Family, image: Image.Image
) -> None:
    latents, _ = family.encode_images(to_pixels(image, 64, 48))
    known = np.asarray(to_images(family.decode(latents))[0], np.int16)
    assert np.array_equal(pictures(family, image=image, prompt_strength=0)[0], known)


def test_the_less_strength_the_nearer_to_the_image(family: Family, image: Image.Image) -> None:
    strengths = (0, 0.2, 0.5, 1)
    generated = [pictures(family, image=image, prompt_strength=each)[0] for each in strengths]
    distances = [np.abs(each - generated[0]).mean() for each in generated]
    assert distances == sorted(distances)
    assert distances[1] > 0


def test_picture_n_is_that_of_the_seed_plus_n(family: Family, image: Image.Image) -> None:
    options = {"image": image, "prompt_strength": 0.6}
    together = pictures(family, num_outputs=2, **options)
    single = [pictures(family, seed=seed, **options)[0] for seed in (3, 4)]
    assert np.array_equal(together, np.stack(single))


@pytest.mark.parametrize(
    ("steps", "strength", "generated"),
    [(8, 0.6, 5), (8, 0.01, 1), (10, 0.5, 5), (50, 1, 50), (8, 0, 0)],
)
def test_of_n_steps_n_times_strength_are_drawn(
    steps: int, strength: float, generated: int, image: Image.Image
) -> None:
    request = Request(
        prompt="x", image=image, prompt_strength=strength, num_inference_steps=steps, seed=1
    )
    resolved = resolve(request, BASES["z-image-turbo"], 16)
    assert resolved.steps - resolved.first_step == generated


def test_a_picture_has_the_images_shape_unless_another_is_asked_for(image: Image.Image) -> None:
    base = BASES["z-image-turbo"]

    def size(**options: Any) -> tuple[int, int]:
        resolved = resolve(Request(prompt="x", seed=1, **options), base, 16)
        return resolved.width, resolved.height

    assert size() == (1024, 1024)
    assert size(image=image) == (1184, 880)  # 4:3
    assert size(image=image, aspect_ratio="1:1") == (1024, 1024)
    assert size(image=image, **SIZE) == (64, 48)
    assert size(image=Image.new("RGB", (4000, 10))) == (1776, 592)  # at most 3:1


def test_an_image_of_another_shape_is_cropped_not_squeezed() -> None:
    bands = Image.new("RGB", (90, 30), "red")
    bands.paste("blue", (30, 0, 60, 30))
    pixels = to_pixels(bands, 32, 32)
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.equal(pixels[0, :, 16, 16], torch.tensor([-1.0, -1.0, 1.0]))
    assert torch.equal(pixels[0, :, 16, 3], torch.tensor([-1.0, -1.0, 1.0]))


def test_an_image_is_read_as_it_is_meant_to_be_seen(tmp_path: Path) -> None:
    turned = Image.new("RGB", (40, 20), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (20, 40)

    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(BrokenImage, match="text.png is not a JPEG, PNG, WebP, HEIC"):
        read_image(tmp_path / "text.png")
    whole = tmp_path / "torn.png"
    Image.effect_noise((64, 64), 50).save(whole)
    whole.write_bytes(whole.read_bytes()[:500])
    with pytest.raises(BrokenImage, match="torn.png is damaged"):
        read_image(whole)
    Image.new("L", (64, 64)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BrokenImage, match="large.png has more than 1,000 pixels"):
        read_image(tmp_path / "large.png")
    with pytest.raises(BrokenImage, match="no such file"):
        read_image(tmp_path / "nowhere.png")
