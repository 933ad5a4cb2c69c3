"""The miniature with Qwen-Image-2.1's classes: the stock pipeline and ours load it, it edits."""

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

from families.loading import load_family
from families.registry import BASES
from inference.generation import generate as generate_with_ours
from inference.request import Request, resolve
from miniature.drawing import render
from miniature.edits import KINDS, sample_edit
from miniature.judge import accuracy, load_judge
from miniature.qwen.models import PIXELS
from miniature.qwen.sampling import QwenBase, generate
from miniature.weights import QWEN, WEIGHTS, load_qwen
from miniature.world import attributes, evaluation_prompts, held_out

EDIT = next(edit for n in range(99) if (edit := sample_edit(n, "eval")).kind == "place")
REFERENCE = render(EDIT.reference, PIXELS)


@pytest.fixture(scope="module")
def base() -> Iterator[QwenBase]:
    yield load_qwen()


def pipeline(folder: Path) -> Any:
    processor = StockProcessor(
        Qwen2Tokenizer.from_pretrained(folder / "processor"),
        Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"),
    )
    made: Any = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=AutoencoderKLQwenImage21.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(
            folder / "text_encoder", dtype=torch.float32
        ),
        processor=processor,  # type: ignore[arg-type]
        transformer=QwenImage21Transformer2DModel.from_pretrained(
            folder / "transformer", torch_dtype=torch.float32
        ),
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    ("prompt", "references"),
    [("a red star at sea", []), (EDIT.instruction, [REFERENCE])],
    ids=["text-to-image", "edit"],
)
def test_the_stock_pipeline_ours_and_the_batched_one_make_the_same_image(
    base: QwenBase, prompt: str, references: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    stock = pipeline(WEIGHTS / QWEN)
    options = {"image": references} if references else {}
    [wanted] = stock(
        prompt=prompt, negative_prompt="", true_cfg_scale=2.0, num_inference_steps=4,
        output_resolution=PIXELS, generator=torch.Generator().manual_seed(3), **options,
    ).images  # fmt: skip
    monkeypatch.setattr("miniature.qwen.sampling.bfloat16_products", torch.no_grad)
    [batched] = generate(base, [prompt], [3], 4, 2.0, references or None)
    assert difference(batched, wanted) <= 1 and wanted.size == (PIXELS, PIXELS)

    family = load_family(BASES[QWEN], torch.device("cpu"), torch.float32)
    request = Request(
        prompt=prompt, seed=3, num_inference_steps=4, reference_images=tuple(references)
    )
    resolved = resolve(request, BASES[QWEN], family.resolution_multiple)
    [ours] = generate_with_ours(family, resolved, reference_images=references)
    assert difference(ours, wanted) <= 1


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of RGB levels."""
    levels = [np.asarray(each.convert("RGB"), dtype=int) for each in (one, other)]
    return int(np.abs(levels[0] - levels[1]).max())


def test_the_included_weights_know_the_dataset_and_edit_it(base: QwenBase) -> None:
    """All attributes of held-out prompts at once; by chance, fewer than one in a thousand."""
    prompts = evaluation_prompts(24)
    images = generate(base, [each.text for each in prompts], list(range(24)), 12, 2.0)
    assert accuracy(load_judge(), images, [each.asked for each in prompts])["all"][0] >= 16
    edits = [sample_edit(n, "eval") for n in range(24)]
    references = [render(each.reference, PIXELS) for each in edits]
    texts = [each.instruction for each in edits]
    images = generate(base, texts, list(range(24)), 12, 1.0, references)
    wanted = [each.asked for each in edits]
    assert accuracy(load_judge(), references, wanted)["all"][0] == 0
    assert accuracy(load_judge(), images, wanted)["all"][0] >= 11


def test_edits_change_what_they_name_and_keep_their_split() -> None:
    for split in ("train", "eval"):
        edits = [sample_edit(n, split) for n in range(300)]  # type: ignore[arg-type]
        assert edits[7] == sample_edit(7, split)  # type: ignore[arg-type]
        assert {edit.kind for edit in edits} == set(KINDS)
        for edit in edits:
            flags = {held_out(t.shape, t.colour, t.texture, edit.target.place)
                     for t in edit.target.things}  # fmt: skip
            assert flags == {split == "eval"}
            before, after = attributes(edit.reference), attributes(edit.target)
            assert edit.asked.items() <= after.items()
            if edit.kind not in ("add", "remove"):
                assert sum(before[key] != after[key] for key in after) == 1
