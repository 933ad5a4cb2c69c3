"""Qwen-Image-2.1 and its Turbo do what their stock pipeline does: same text, loss and images."""

import logging
import re
import shutil
import zipfile
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
from safetensors.torch import save_file
from stock_processor import StockProcessor
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration
from vault.models import QWEN_IMAGE_21_SIGMAS, write_qwen_image_21

from adapters.archive import read_archive
from adapters.formats import LoraMismatch
from families import tiles
from families.base import Base
from families.download import fetch
from families.family import Family
from families.loading import load_family
from families.models import qwen_image_21
from families.prefix import common_ids, read_prefix
from families.recomputation import recompute
from families.registry import BASES, UnknownBase, find_base_or_folder
from families.repository import MissingModel
from families.without_weights import family_without_weights
from inference.engine import Engine
from inference.generation import generate
from inference.images import save_images
from inference.request import Request, resolve
from trainer.data import Example, Purpose, check_examples, read_dataset
from trainer.learning import encode_images, find_turbo_adapter
from trainer.learning.loss import flow_loss, noisy
from trainer.result.model_card import model_card
from trainer.run import train_and_check
from trainer.settings.fields import Settings
from trainer.settings.fields import resolve as resolve_settings
from trainer.settings.inputs import SettingsError, TrainingInputs

PROMPTS = ["a photo of a cat", "", "two red boats, one behind the other, in a harbour at dawn"]
BASE, TURBO = (BASES[name] for name in ("qwen-image-2.1", "qwen-image-2.1-turbo"))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vault21(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = write_qwen_image_21(tmp_path_factory.mktemp("vault21"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(folder))
        yield folder
    shutil.rmtree(folder)


def load(part: Any, folder: Path) -> Any:
    return part.from_pretrained(folder)


@pytest.fixture(scope="module")
def pair(vault21: Path) -> tuple[Family, Any]:
    """Our family and the stock pipeline over the same files, float32."""
    folder = vault21 / BASE.hub_id
    stock: Any = QwenImage21Pipeline(
        scheduler=load(FlowMatchEulerDiscreteScheduler, folder / "scheduler"),
        vae=load(AutoencoderKLQwenImage21, folder / "vae"),
        text_encoder=load(Qwen3VLForConditionalGeneration, folder / "text_encoder"),
        processor=StockProcessor(load(Qwen2Tokenizer, folder / "processor")),  # type: ignore[arg-type]
        transformer=load(QwenImage21Transformer2DModel, folder / "transformer"),
    )
    stock.set_progress_bar_config(disable=True)
    return load_family(BASE, CPU, torch.float32), stock


@pytest.fixture(scope="module")
def turbo_pair(vault21: Path, pair: tuple[Family, Any]) -> tuple[Family, Any]:
    """The same of Turbo, whose text encoder and VAE are those of the base."""
    family, folder = load_family(TURBO, CPU, torch.float32), vault21 / TURBO.hub_id
    family.__dict__.update({k: getattr(pair[0], k) for k in ("prompts", "text_encoder", "vae")})
    own = {
        "scheduler": load(FlowMatchEulerDiscreteScheduler, folder / "scheduler"),
        "transformer": load(QwenImage21Transformer2DModel, folder / "transformer"),
    }
    stock: Any = QwenImage21Pipeline(**pair[1].components | own, sample_sigmas=QWEN_IMAGE_21_SIGMAS)
    stock.set_progress_bar_config(disable=True)
    return family, stock


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def test_prompt_features_are_the_stock_pipelines(pair: tuple[Family, Any]) -> None:
    """Before the last norm, without the system turn's 14 tokens; long prompts are not cut."""
    family, stock = pair
    assert stock._drop_idx == 14
    prompts = [*PROMPTS, "word " * 700, "\n\nlines\n"]
    together = family.encode_prompts(prompts[:3])
    for number, prompt in enumerate(prompts):
        wanted = stock.encode_prompt(prompt or family.empty_prompt)[0][0]
        alone = family.encode_prompts([prompt or family.empty_prompt])[0]
        torch.testing.assert_close(alone, wanted, atol=2e-5, rtol=2e-5)
        if prompt and number < 3:
            torch.testing.assert_close(together[number], wanted, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_placeholder_is_read_at_its_place_with_and_without_a_known_beginning(
    pair: tuple[Family, Any],
) -> None:
    """Its vector in place of a known token's gives that token's features."""
    family, _ = pair
    [cat] = family.tokenize(" cat").ids[17:18]
    vectors = {"<zwx>": family.text_encoder.get_input_embeddings().weight[cat][None].clone()}
    prompts = ["a photo of<zwx> on a chair", "a photo of<zwx>"]
    wanted = family.encode_prompts([each.replace("<zwx>", " cat") for each in prompts])
    ids = common_ids([family.tokenize(each, vectors) for each in prompts])
    assert len(ids) > 17
    for prefix in (None, read_prefix(family.text_encoder, ids)):
        for found, other in zip(
            family.encode_prompts(prompts, vectors, prefix), wanted, strict=True
        ):
            torch.testing.assert_close(found, other, atol=2e-5, rtol=2e-5)


def stock_velocity(
    stock: Any, latents_CHW: torch.Tensor, sigma: torch.Tensor, text_LD: torch.Tensor
) -> torch.Tensor:
    channels, rows, columns = latents_CHW.shape
    out = stock.transformer(
        hidden_states=stock._pack_latents(latents_CHW[None], 1, channels, rows, columns),
        timestep=(sigma * 1000).expand(1) / 1000,
        encoder_hidden_states=text_LD[None],
        img_shapes=[[(1, rows, columns)]],
        img_mask=(torch.arange(len(text_LD) + rows * columns // 4) >= len(text_LD))[None],
        return_dict=False,
    )[0]
    return out[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


def test_loss_and_gradients_are_those_of_the_stock_forward(pair: tuple[Family, Any]) -> None:
    """One prompt at a time: a batch would pad the texts and shift the image's position. With and
    without recomputation."""
    family, stock = pair
    with torch.no_grad():
        text = [each.requires_grad_() for each in family.encode_prompts(PROMPTS)]
    shape = (len(PROMPTS), family.latent_channels, 6, 10)
    latents, noise = torch.randn(shape), torch.randn(shape)
    sigma = torch.tensor([0.05, 0.5, 0.97])
    noised = noisy(latents, noise, sigma)
    velocity = torch.cat(
        [stock_velocity(stock, *each) for each in zip(noised, sigma, text, strict=True)]
    )
    wanted = torch.nn.functional.mse_loss(velocity, noise - latents)
    gradients = torch.autograd.grad(wanted, text)
    for share in (0.0, 0.5):
        recompute(family, share)
        ours = flow_loss(family, latents, noise, sigma, text)
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)
        for found, other in zip(torch.autograd.grad(ours, text), gradients, strict=True):
            torch.testing.assert_close(found, other, atol=1e-6, rtol=1e-4)
    recompute(family, 0.0)


@pytest.mark.parametrize(
    ("turbo", "guidance", "size"),
    [(False, 1.0, (160, 96)), (False, 3.5, (64, 96)), (True, 1.0, (96, 224))],
)
@torch.inference_mode()
def test_a_seed_gives_the_stock_pipelines_image(
    turbo: bool,
    guidance: float,
    size: tuple[int, int],
    pair: tuple[Family, Any],
    turbo_pair: tuple[Family, Any],
) -> None:
    """RGB and alpha. Turbo has its own eight sigmas, whatever the size."""
    family, stock = turbo_pair if turbo else pair
    steps = None if turbo else 4
    sides = dict(zip(("width", "height"), size, strict=True))
    negative = "blur" if guidance > 1 else ""
    request = Request(
        **{"prompt": "a red fox", "negative_prompt": negative, "num_inference_steps": steps},
        **sides | {"guidance_scale": guidance, "seed": 7},
    )
    [ours] = generate(family, resolve(request, family.base, family.resolution_multiple))
    wanted = stock(
        prompt="a red fox",
        negative_prompt=negative or None,
        **sides,
        num_inference_steps=steps or 1,
        true_cfg_scale=guidance,
        generator=torch.Generator().manual_seed(7),
        use_kv_cache=turbo,  # the same but for rounding
    ).images[0]
    assert (ours.size, ours.mode) == (wanted.size, wanted.mode) == (size, "RGBA")
    difference = np.abs(np.asarray(ours, np.int16) - np.asarray(wanted, np.int16))
    assert difference.max() <= 1
    assert np.asarray(ours).std() > 1


def test_turbos_sigmas_are_fixed_and_interpolated_for_other_steps(
    turbo_pair: tuple[Family, Any],
) -> None:
    family, _ = turbo_pair
    assert family.sigmas(8, 2048, 512).tolist() == pytest.approx([*QWEN_IMAGE_21_SIGMAS, 0])
    assert family.sigmas(4, 64, 64).tolist() == pytest.approx([*QWEN_IMAGE_21_SIGMAS[::2], 0])
    assert family.sigmas(1, 64, 64).tolist() == [1, 0]
    more = family.sigmas(11, 64, 64)
    assert (more[0], more[-1]) == (1, 0) and more.diff().max() < 0


@pytest.mark.parametrize("transparent", [False, True], ids=["opaque", "transparent"])
@torch.no_grad()
def test_an_image_is_encoded_as_by_the_stock_vae_whole_or_in_tiles(
    transparent: bool, pair: tuple[Family, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, stock = pair
    pixels = torch.rand(2, 4 if transparent else 3, 160, 224) * 2 - 1
    whole_B4PP = torch.cat((pixels, torch.ones(2, 1, 160, 224)), dim=1)[:, :4]
    posterior = stock.vae.encode(whole_B4PP[:, :, None]).latent_dist
    center = torch.tensor(stock.vae.config.latents_mean).view(1, -1, 1, 1)
    spread = torch.tensor(stock.vae.config.latents_std).view(1, -1, 1, 1)
    wanted = (posterior.mean[:, :, 0] - center) / spread, posterior.std[:, :, 0] / spread
    pixels_out = stock.vae.decode((wanted[0] * spread + center)[:, :, None]).sample[:, :, 0]
    monkeypatch.setattr(tiles, "TILE_CELLS", 16)
    for whole in (1 << 30, 0):
        monkeypatch.setattr(qwen_image_21, "WHOLE_PIXELS", whole)
        for found, other in zip(family.encode_images(pixels), wanted, strict=True):
            torch.testing.assert_close(found, other, atol=1e-5, rtol=1e-4)
        decoded = family.decode(wanted[0])
        assert decoded.shape == (2, 4, 160, 224)
        assert (decoded - pixels_out).abs().max() < 1 / 255 / 50


@torch.no_grad()
def test_transparent_images_keep_their_alpha_and_opaque_ones_stay_as_they_were(
    pair: tuple[Family, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pixels = np.random.default_rng(0).integers(1, 256, (64, 64, 4), dtype=np.uint8)
    pixels[:8, :, 3], pixels[8:16, :, 3] = 0, 255
    hidden = pixels.copy()
    hidden[:8, :, :3] = 200
    files = {"clear": pixels, "opaque": pixels[..., :3], "same": hidden}
    for name, each in files.items():
        Image.fromarray(each).save(tmp_path / f"{name}.png")
    examples = read_dataset(tmp_path, "TOK")
    assert [each.transparent for each in examples] == [True, False, True]

    def means(keep: bool, examples: list[Example] = examples) -> list[torch.Tensor]:
        settings = resolve_settings(
            TrainingInputs(
                dataset=tmp_path, base_model=BASE.name, resolution=64, keep_transparency=keep
            )
        )
        family = load_family(BASE, CPU, torch.float32)
        return [each.mean_CHW for each in encode_images(family, examples, settings)]

    clear, opaque, same = means(keep=True)
    over_white = means(keep=False)
    assert torch.allclose(opaque, over_white[1], atol=1e-5)  # batched with other images
    alone = [means(keep, examples[1:2])[0] for keep in (True, False)]
    assert torch.equal(*alone)
    assert torch.equal(clear, same)  # what was cut away is not trained on
    assert not torch.allclose(clear, over_white[0], atol=0.1)
    straight = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    straight[:, :3, :8] = -1
    wanted = pair[0].encode_images(straight)[0][0]
    torch.testing.assert_close(clear, wanted, atol=1e-4, rtol=1e-3)


def test_keeping_transparency_needs_an_alpha_channel(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (255, 0, 0, 90)).save(tmp_path / "a.png")
    Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save(tmp_path / "b.png")

    def settings(**given: Any) -> Settings:
        return resolve_settings(TrainingInputs(dataset=tmp_path, **given))

    for given, complaint in (
        ({"base_model": "z-image"}, "z-image generates no alpha channel; switch it off, or train"),
        ({"base_model": BASE.name, "masks": "alpha"}, "masks is alpha, so what is transparent is"),
    ):
        with pytest.raises(SettingsError, match=complaint):
            settings(keep_transparency=True, **given)
    examples = read_dataset(tmp_path, "TOK")

    def found(those: list[Example], **given: Any) -> list[str]:
        purpose = Purpose.of(settings(**given))
        return [e.text for e in check_examples(those, purpose) if e.check == "transparency"]

    kept = {"base_model": BASE.name, "keep_transparency": True}
    assert found(examples, base_model="z-image") == []
    [text] = found(examples, base_model=BASE.name)
    assert text.startswith("transparent images become white there; keep_transparency")
    assert text.endswith(": a.png")
    assert found(examples, **kept) == [
        "transparent images, which are trained on as they are: a.png"
    ]
    assert "no image is transparent" in found(examples[1:], **kept)[0]


def test_every_lora_target_learns_and_the_published_model_has_its_numbers(
    pair: tuple[Family, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(BASE, CPU, torch.float32)
    family.__dict__["text_encoder"] = pair[0].text_encoder
    layers = dict(family.transformer.named_modules())
    for target in family.lora_targets():
        layers[target].weight.requires_grad_(True)
    with torch.no_grad():
        text = pair[0].encode_prompts(["a cat"])
    shape = (1, family.latent_channels, 4, 4)
    family.velocity(torch.randn(shape), torch.tensor([0.5]), text).square().sum().backward()
    dead = [t for t in family.lora_targets() if not layers[t].weight.grad.abs().sum() > 0]
    assert dead == [] and len(family.lora_targets()) == 2 * 7
    assert (
        family.lora_targets("attention,!to_out.0")
        == family.lora_groups()["attention"][:3] + family.lora_groups()["attention"][4:7]
    )

    monkeypatch.delenv("MODEL_VAULT")
    published = family_without_weights(BASE)
    parts = (published.transformer, published.text_encoder, published.vae)
    counts = [sum(each.numel() for each in part.parameters()) for part in parts]
    assert counts == [7_115_124_736, 7_568_401_408, 337_740_404]
    assert len(published.lora_targets()) == 224
    assert published.resolution_multiple == BASE.size_multiple == 32
    assert published.latent_size(2752, 1536) == (96, 172)
    text_LD = torch.zeros(128, 4096, dtype=torch.bfloat16, device="meta")
    latents = torch.zeros(1, 64, 96, 172, device="meta")
    with torch.no_grad():
        velocity = published.velocity(latents, torch.ones(1, device="meta"), [text_LD])
    assert velocity.shape == latents.shape


def test_a_folder_with_a_schedule_is_a_turbo(vault21: Path, tmp_path: Path) -> None:
    """Tensors are the same in both, so a fine-tune is known by its model_index.json only."""
    index = (vault21 / TURBO.hub_id / "model_index.json").read_text()
    file = tmp_path / "mine" / "model_index.json"
    file.parent.mkdir()
    file.write_text(index.replace("0.978453", "0.96"))
    found = find_base_or_folder(str(file.parent))
    assert (found.name, found.distilled, found.inference_steps) == ("mine", True, 8)
    assert found.sample_sigmas[:3] == (1.0, 0.96, 0.95418)
    file.write_text((vault21 / BASE.hub_id / "model_index.json").read_text())
    assert not find_base_or_folder(str(file.parent)).distilled
    file.write_text(index.replace("0.978453", "2"))
    with pytest.raises(UnknownBase, match="sample_sigmas must be falling numbers"):
        find_base_or_folder(str(file.parent))


def write_assistant(folder: Path, layer: str) -> None:
    """A training adapter in the published file's place."""
    adapter = BASE.training_adapters["v3"]
    place = folder / adapter.hub_id
    place.mkdir(parents=True, exist_ok=True)
    key = f"transformer.transformer_blocks.0.attn.{layer}"
    factors = {"lora_A": torch.randn(2, 64), "lora_B": torch.randn(64, 2)}
    save_file({f"{key}.{k}.weight": each for k, each in factors.items()}, place / adapter.name)


def test_a_lora_of_the_base_is_trained_over_the_assistant_and_used_on_turbo(
    vault21: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With the license's notice in all that is written."""
    monkeypatch.setenv("MODEL_VAULT", str(vault21))
    given: dict[str, Any] = {"dataset": photos, "resolution": "64", "rank": 2, "steps": 2}
    given |= {"seed": 5, "preserve": "off", "validation_every": 0, "batch_size": 2}
    given |= {"sample_prompts": ("a photo of TOK",)}
    given["sample_options"] = {"width": 64, "height": 64, "num_inference_steps": 2}

    def settings(base: Base, name: str) -> Settings:
        inputs = TrainingInputs(base_model=base.name, output_dir=tmp_path / name, **given)
        return resolve_settings(inputs)

    write_assistant(vault21, "to_x")
    with pytest.raises(LoraMismatch, match="pytorch_lora_weights.*attn.to_x.*has no to_x"):
        find_turbo_adapter(settings(BASE, "refused"))
    write_assistant(vault21, "to_q")
    caplog.set_level(logging.INFO)
    weights = train_and_check(settings(BASE, "out")).weights
    assert "pytorch_lora_weights.safetensors: merged 1 of 1" in caplog.text
    assert BASE.terms is not None
    archive = read_archive(weights)
    notice = archive.meta["license_notice"]
    assert notice == BASE.terms.notice and notice.startswith("Built with Qwen. ")
    with zipfile.ZipFile(weights) as zipped, zipped.open("lora/lora_weights.safetensors") as file:
        assert notice.encode() in file.read()
    card = model_card("me/fox", archive.meta, [])
    assert notice in card and "license_name: qwen-research" in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "the card", "exec")
    assert "pipeline.processor.tokenizer(part" in code

    assert find_turbo_adapter(settings(TURBO, "turbo")) is None
    assert "no training adapter for it is known" in caplog.text
    assert "Train on qwen-image-2.1: its LoRAs work on qwen-image-2.1-turbo, too" in caplog.text

    caplog.clear()
    engine = Engine(CPU, torch.float32)
    request = Request(prompt="a photo of <zwx>", width=512, height=512, seed=1)
    [image] = engine.generate(request, archive, TURBO.name)
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []
    assert "LoRA: applied 14 of 14 modules at scale 1" in caplog.messages
    for kind, mode in (("png", "RGBA"), ("jpg", "RGB"), ("webp", "RGB")):
        [path] = save_images([image], tmp_path / kind, kind)
        with Image.open(path) as saved:
            assert saved.mode == mode and saved.size == image.size


def test_the_license_is_named_at_the_download(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the command, and when a run downloads by itself; once."""
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    caplog.set_level(logging.INFO)
    assert BASE.terms is not None
    with pytest.raises(MissingModel):  # there is no network here
        fetch(BASE.hub_id, tmp_path)
    assert f"non-commercial: {BASE.terms.notice} https://" in capsys.readouterr().out
    for _ in range(2):
        with pytest.raises(MissingModel):
            load_family(BASE, CPU)
    assert caplog.text.count(BASE.terms.notice) == 1
