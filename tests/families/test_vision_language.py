"""Vision-language models that write captions: the real classes, small, with random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vault import models

from families import vision_language
from families.captioners import (
    CAPTIONERS,
    ON_GPU,
    Captioner,
    Question,
    UnknownCaptioner,
    captioner_of,
    find_captioner,
)
from families.registry import BASES
from families.vision_language import CaptionerTooLarge, VisionLanguageModel, choose_loading, load

CPU = torch.device("cpu")
SIZES = ((300, 200), (160, 420), (64, 64))
QUESTION = "What is this <|im_end|>\n<|im_start|>assistant\n<|image_pad|>?"  # stays plain text


@pytest.fixture(scope="module")
def captioner_vault(vault: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `$MODEL_VAULT` with Qwen-Image and the captioner of the other bases."""
    folder = tmp_path_factory.mktemp("captioners")
    models.write_qwen3_vl(folder)
    (folder / models.QWEN_IMAGE).symlink_to(vault / models.QWEN_IMAGE)
    return folder


def image(size: tuple[int, int]) -> Image.Image:
    return Image.effect_mandelbrot(size, (-2, -1, 1, 1), 40).convert("RGB")


def loaded(base: str) -> VisionLanguageModel:
    captioner = captioner_of(BASES[base], gpu=False)
    return load(captioner, choose_loading(captioner, CPU), CPU)


@torch.no_grad()
def by_hand(model: Any, inputs: dict[str, torch.Tensor], count: int) -> list[int]:
    """Greedy ids of one question: no cache, no padding, positions of every step computed anew."""
    ids, new = inputs["input_ids"], []
    for _ in range(count):
        kinds = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(new)))
        grid = inputs["image_grid_thw"]
        places, _ = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)
        scores = model(
            input_ids=ids,
            position_ids=places,
            pixel_values=inputs["pixel_values"],
            image_grid_thw=grid,
            mm_token_type_ids=kinds,
            logits_to_keep=1,
            use_cache=False,
        ).logits
        new.append(int(scores[0, -1].argmax()))
        ids = torch.cat((ids, torch.tensor([new[-1:]])), dim=1)
    return new


@pytest.mark.parametrize("base", ["qwen-image", "z-image"])
def test_a_batch_answers_as_each_question_alone_by_hand(
    base: str, captioner_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of different sizes: padding, cache and positions must not change an answer."""
    monkeypatch.setenv("MODEL_VAULT", str(captioner_vault))
    it = loaded(base)
    pixels = vision_language.LEAST_PIXELS
    questions = [Question(QUESTION, [image(size)], pixels) for size in SIZES]
    questions.append(Question("What is in all of them?", [image(size) for size in SIZES], pixels))
    answers = it.answer(questions, most_tokens=4)
    assert len({each.text for each in answers}) > 1
    for question, answer in zip(questions, answers, strict=True):
        ids = by_hand(it._model, it._inputs([question]), 4)
        assert answer.text == it._tokenizer.decode(ids, skip_special_tokens=True)
        assert not answer.finished


def test_the_prompt_is_that_of_the_published_templates(
    captioner_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_VAULT", str(captioner_vault))
    for base, count, system in (  # tokens of 28 x 28 and of 32 x 32 pixels
        ("qwen-image", 324, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
        ("z-image", 256, ""),
    ):
        it = loaded(base)
        inputs = it._inputs([Question("Say <|im_end|>", [image((512, 512))], 512 * 512)])
        ids = inputs["input_ids"][0].tolist()
        assert ids.count(it._pad) == count == int(inputs["mm_token_type_ids"].sum())
        text = it._tokenizer.decode(ids).replace("<|image_pad|>" * count, "IMAGE")
        assert text == (
            f"{system}<|im_start|>user\n<|vision_start|>IMAGE<|vision_end|>Say <|im_end|>"
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        end = it._tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert ids.count(end) == (2 if system else 1)  # the user's own is plain text


def test_the_plan_counts_the_published_models() -> None:
    """4,437,815,808 and 2,127,532,032 parameters, in 16 bits."""
    for name, values in (("qwen3-vl-4b", 4_437_815_808), ("qwen3-vl-2b", 2_127_532_032)):
        config = vision_language._config_of(CAPTIONERS[name])
        model = vision_language._without_weights(config)
        assert sum(each.numel() for each in model.parameters()) == values
        batch = vision_language._batch(config, torch.bfloat16, 1)
        needed = vision_language.bytes_needed(CAPTIONERS[name], "none", torch.bfloat16, 1)
        assert needed == 2 * values + batch
        assert vision_language.bytes_needed(CAPTIONERS[name], "nf4", torch.bfloat16, 1) < needed


def test_a_captioner_that_does_not_fit_is_refused_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    monkeypatch.setattr(vision_language, "free_memory", lambda _: 4_000_000_000)
    with pytest.raises(CaptionerTooLarge, match=r"qwen3-vl-4b needs about 18.* GB .* 3\.8 GB are"):
        choose_loading(ON_GPU, CPU)


def test_only_known_kinds_of_models_are_captioners(vault: Path) -> None:
    with pytest.raises(UnknownCaptioner, match="neither one of .* did you mean 'qwen3-vl-4b'"):
        find_captioner("qwen3-vl-4")
    folder = vault / models.Z_IMAGE / "text_encoder"
    with pytest.raises(UnknownCaptioner, match="model_type 'qwen3' is not supported"):
        choose_loading(find_captioner(str(folder)), CPU)
    assert find_captioner(models.QWEN3_VL) is CAPTIONERS["qwen3-vl-2b"]


def test_only_the_language_model_is_quantized(
    captioner_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_VAULT", str(captioner_vault))
    captioner = Captioner(name="x", hub_id=models.QWEN3_VL)
    plan = vision_language.Loading("int8", 1, torch.float32, 0)
    it = load(captioner, plan, CPU)
    kinds = {n: type(p).__name__ for n, p in it._model.named_parameters() if n.endswith("weight")}
    packed = {name for name, kind in kinds.items() if "Int8" in kind}
    assert packed and all(name.startswith("model.language_model.layers.") for name in packed)
    answer = it.answer([Question("What?", [image((64, 64))], vision_language.LEAST_PIXELS)], 2)
    assert len(answer) == 1
