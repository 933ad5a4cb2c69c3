"""Reference images are read as by diffusers' QwenImageEditPlusPipeline."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock_module
from PIL import Image
from stock_processor import StockProcessor
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)
from vault.models import write_qwen_image_edit

from adapters.archive import Archive
from adapters.placeholder import Placeholder
from families.base import Base
from families.family import Family
from families.loading import load_family
from families.models.qwen_image import QwenImage
from families.references import References, size_near
from families.registry import BASES, find_base_or_folder
from families.without_weights import family_without_weights
from inference.__main__ import arguments_parser
from inference.engine import Engine
from inference.generation import generate
from inference.images import read_image
from inference.inputs import GenerationInputs
from inference.request import Request, check_work, resolve, work
from trainer.memory.step_cost import Meter, _tensors, fused_attention

CPU = torch.device("cpu")
PROMPT = "put <zwx> of Picture 1 on the table"
SLOT = 151655  # <|image_pad|>


def image(width: int, height: int, phase: float) -> Image.Image:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(columns / 9 + phase), np.cos(rows / 7), np.sin((rows + columns) / 11 - phase)]
    return Image.fromarray((np.stack(waves, -1) * 100 + 128).astype(np.uint8))


IMAGES = [image(97, 61, 0.0), image(50, 111, 2.0)]


@pytest.fixture(scope="module")
def edit_vault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_image_edit(tmp_path_factory.mktemp("edit"))


@pytest.fixture(autouse=True)
def small(edit_vault: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reference images of few pixels, for both."""
    monkeypatch.setenv("MODEL_VAULT", str(edit_vault))
    small = replace(QwenImage.reference_format, seen_pixels=100 * 100)
    monkeypatch.setattr(QwenImage, "reference_format", small)
    monkeypatch.setattr(Base, "reference_resolution", 80)
    monkeypatch.setattr(stock_module, "CONDITION_IMAGE_SIZE", 100 * 100)
    monkeypatch.setattr(stock_module, "VAE_IMAGE_SIZE", 80 * 80)
    yield


def stock_of(folder: Path) -> Any:
    """The pipeline, with the token <zwx> in its tokenizer."""
    encoder: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder")
    forward = encoder.forward

    def with_types(input_ids: torch.Tensor, **given: Any) -> Any:
        # transformers 5 needs them for the positions in an image; the pipeline was written for 4.
        return forward(input_ids=input_ids, mm_token_type_ids=(input_ids == SLOT).int(), **given)

    encoder.forward = with_types
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_tokens(["<zwx>"])
    pipeline = stock_module.QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        text_encoder=encoder,
        tokenizer=tokenizer,
        processor=StockProcessor(tokenizer, Qwen2VLImageProcessorPil()),
        transformer=QwenImageTransformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def family_of_base(name: str) -> Family:
    return load_family(BASES[name], CPU, torch.float32)


@pytest.mark.parametrize(
    ("name", "count", "guidance"),
    [("qwen-image-edit-2509", 1, 1.0), ("qwen-image-edit-2511", 2, 3.5)],
)
@torch.inference_mode()
def test_features_and_image_are_the_stock_pipelines(
    name: str, count: int, guidance: float, edit_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a placeholder token in the prompt, whose vector is the stock tokenizer's new row."""
    family, images = family_of_base(name), IMAGES[-count:]
    stock = stock_of(edit_vault / family.base.hub_id)
    row = stock.tokenizer.convert_tokens_to_ids("<zwx>")
    vectors = {"<zwx>": stock.text_encoder.get_input_embeddings().weight[row][None].clone()}
    ours, theirs = [], []
    velocity, forward = family.edit_velocity, stock.transformer.forward

    def noted(*given: Any, **named: Any) -> torch.Tensor:
        ours.append(velocity(*given, **named))
        return ours[-1]

    def noted_stock(**given: Any) -> Any:
        [out] = forward(**given)
        rows, columns = given["img_shapes"][0][0][1:]
        theirs.append(family._unpack(out[:, : rows * columns], rows, columns))  # type: ignore
        text.append(given["encoder_hidden_states"][0])
        return (out,)

    text: list[torch.Tensor] = []
    monkeypatch.setattr(family, "edit_velocity", noted)
    monkeypatch.setattr(stock.transformer, "forward", noted_stock)
    request = Request(
        prompt=PROMPT,
        negative_prompt="blur" if guidance > 1 else "",
        reference_images=tuple(images),
        num_inference_steps=3,
        guidance_scale=guidance,
        width=64,
        height=96,
        seed=7,
    )
    resolved = resolve(request, family.base, family.resolution_multiple)
    [found] = generate(family, resolved, vectors, reference_images=request.reference_images)
    [wanted] = stock(
        image=list(images),
        prompt=PROMPT,
        negative_prompt="blur" if guidance > 1 else None,
        true_cfg_scale=guidance,
        num_inference_steps=3,
        width=64,
        height=96,
        generator=torch.Generator().manual_seed(7),
    ).images
    encoded = family.encode_references(images)
    mine = family.encode_edit(PROMPT, encoded, vectors)
    torch.testing.assert_close(mine, text[0], atol=2e-5, rtol=2e-5)
    if guidance > 1:
        negative = family.encode_edit("blur", encoded)
        torch.testing.assert_close(negative, text[1], atol=2e-5, rtol=2e-5)
    assert len(ours) == len(theirs) == 3 * (2 if guidance > 1 else 1)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    difference = np.abs(np.asarray(found, np.int16) - np.asarray(wanted, np.int16))
    assert difference.max() <= 1 and np.asarray(found).std() > 1


@torch.inference_mode()
def test_transparent_pixels_are_white_for_a_vae_without_alpha(tmp_path: Path) -> None:
    """They are read with their transparency, which another base model uses."""
    IMAGES[0].convert("LA").save(tmp_path / "a.png")
    clear = Image.open(tmp_path / "a.png")
    clear.putalpha(0)
    clear.save(tmp_path / "a.png")
    read = [read_image(tmp_path / "a.png", name) for name in ("reference_images", "image")]
    assert [each.mode for each in read] == ["RGBA", "RGB"]
    family = family_of_base("qwen-image-edit-2511")
    digests = {family.encode_references([each]).digest for each in (clear, *read)}
    assert digests == {family.encode_references([Image.new("RGB", clear.size, "white")]).digest}


def test_the_engine_edits_and_refuses_what_the_base_does_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = []
    for number, each in enumerate(IMAGES):
        each.save(path := tmp_path / f"{number}.png")
        paths.append(path)
    engine = Engine(CPU, torch.float32)

    def predict(files: list[Path], base: str = "qwen-image-edit-2511", **given: Any) -> np.ndarray:
        inputs: dict[str, Any] = {"prompt": "a red cup", "base_model": base, "seed": 1}
        inputs |= {"num_inference_steps": 1, "guidance_scale": 1, "output_format": "png"}
        inputs |= {"reference_images": files} | given
        options: dict[str, Any] = {"any_file": True, "output_dir": tmp_path / "out"}
        [made] = engine.predict(GenerationInputs(**inputs), **options)
        return np.asarray(Image.open(made))

    with monkeypatch.context() as patch:  # nothing is loaded before a refusal
        patch.setattr(engine, "_load", lambda base: pytest.fail("loaded"))
        for files, base, said in (
            ([], "qwen-image-edit-2511", "edits images: give 1 to 3 in reference_images"),
            (paths * 6, "auto", "has 12 images; no model takes more than 10"),
            (paths, "qwen-image", "takes no reference_images; .* qwen-image-edit-2511, qwen"),
            ([tmp_path / "none.png"], "qwen-image-edit-2511", "image .*none.png: no such file"),
        ):
            with pytest.raises(ValueError, match=said):
                predict(files, base)
        thin = Request(prompt="x", reference_images=(Image.new("RGB", (330, 20)),))
        with pytest.raises(ValueError, match="reference image 1 is 330x20; crop it"):
            engine.generate(thin, base_model="qwen-image-edit-2511")
        four = Request(prompt="x", reference_images=IMAGES * 2)
        with pytest.raises(ValueError, match="4 reference_images; .*-2509 takes at most 3"):
            engine.generate(four, base_model="qwen-image-edit-2509")
    size = {"width": 64, "height": 64}
    one = predict(paths[:1], **size)
    assert one.shape == (64, 64, 3)
    assert not np.array_equal(one, predict(paths[1:], **size))  # the text cache knows the images
    assert not np.array_equal(one, predict(paths, **size))
    assert np.array_equal(one, predict(paths[:1], **size))

    many = Request(prompt="x", reference_images=tuple(IMAGES), num_outputs=8)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="beside 2 reference images are too much for one request"),
    ):
        patch.setattr(Base, "reference_resolution", 1024)
        check_work(many.replace(num_inference_steps=60), BASES["qwen-image-edit-2511"])

    given = arguments_parser().read(["--prompt", "x", "--reference-images", *map(str, paths)])
    assert GenerationInputs(
        **{name: given[name] for name in ("prompt", "reference_images")}
    ).reference_images == list(map(str, paths))

    # A LoRA for Qwen-Image fits, with its token.
    token = Placeholder("<zwx>", torch.randn(1, 64))
    archive = Archive({}, (token,), {"base_model": "Qwen/Qwen-Image"})
    request = Request(prompt=PROMPT, reference_images=(IMAGES[0],), seed=1, **size)
    request = request.replace(num_inference_steps=1, guidance_scale=1)
    with_token, without = (
        engine.generate(request, each, "qwen-image-edit-2511")[0] for each in (archive, None)
    )
    assert not np.array_equal(with_token, without)


def test_sizes_are_the_pipelines_and_a_folder_is_recognized(
    edit_vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Base, "reference_resolution", 1024)
    base = BASES["qwen-image-edit-2511"]
    family = load_family(base, CPU)
    for width, height in ((1024, 1024), (97, 61), (50, 111), (640, 480), (1080, 1920), (300, 101)):
        pictures = (Image.new("RGB", (9, 9)), Image.new("RGB", (width, height)))
        resolved = resolve(Request(prompt="x", reference_images=pictures), base, 32)
        wanted = stock_module.calculate_dimensions(1024 * 1024, width / height)
        assert (resolved.width, resolved.height) == wanted
        assert size_near(1024 * 1024, pictures[1].size, 32) == wanted
    assert family.resolution_multiple == base.size_multiple == 32
    assert family.tokenize("").template_length == 64  # as the pipeline drops

    file = tmp_path / "mine" / "model_index.json"
    file.parent.mkdir()
    file.write_text((edit_vault / base.hub_id / "model_index.json").read_text())
    assert find_base_or_folder(str(file.parent)).most_references == 3


def test_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_VAULT")
    family = family_without_weights(BASES["qwen-image-edit-2511"])
    parts = (family.transformer, family.text_encoder, family.vision_encoder)
    counts = [sum(each.numel() for each in part.parameters()) for part in parts]
    assert counts == [20_430_401_088, 7_070_619_136, 676_550_144]
    latents = torch.zeros(1, 16, 128, 128, device="meta")
    family.transformer.transformer_blocks = family.transformer.transformer_blocks[:2]
    passes = []
    for count in (0, 3):
        text_LD = torch.zeros(100 + 200 * count, 3584, dtype=torch.bfloat16, device="meta")
        encoded = References((latents,) * count, (), (), "")
        known = [*_tensors(family.transformer), latents, text_LD]
        with torch.no_grad(), fused_attention(), Meter(known) as meter:
            sigma = torch.ones(1, device="meta")
            velocity = family.edit_velocity(latents, sigma, [text_LD], encoded)
        assert velocity.shape == latents.shape
        passes.append(meter)
    vae = sum(each.numel() for each in family.vae.parameters())
    needed = 2 * sum(counts) + 4 * vae + passes[1].peak  # in inference each block frees its own
    assert family.base.generation_memory == pytest.approx(needed / 1e9, rel=0.01)
    monkeypatch.setattr(Base, "reference_resolution", 1024)
    square = Request(prompt="x", width=1024, height=1024)
    more = square.replace(reference_images=IMAGES[:1] * 3)
    counted = work(more, family.base) / work(square, family.base)
    assert counted == pytest.approx(passes[1].flops / passes[0].flops, rel=0.05)
