"""A model card: its code generates our image with diffusers alone; it has what the Hub reads."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
import yaml
from cards import PROMPT, WORD, Finished, code_of, difference, generated_by_us
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from hub_server import Hub
from PIL import Image
from stock_processor import StockProcessor
from transformers import Qwen2Tokenizer, Qwen2VLImageProcessorPil
from vault.models import write_qwen_image_21, write_qwen_image_edit

from adapters.archive import read_archive
from families.base import Base
from families.models.qwen_image import QwenImage
from families.registry import family_of, find_base
from trainer.result.model_card import model_card
from trainer.result.publishing import publish
from trainer.settings.secret import Secret


@pytest.mark.parametrize(
    ("base_model", "word", "options"),
    [
        ("z-image-turbo", WORD, {}),
        ("z-image-de-turbo", None, {"guidance_scale": 2.5}),
        ("qwen-image", WORD, {"guidance_scale": 4.0}),
    ],
)
def test_the_cards_code_draws_our_picture_with_diffusers_alone(
    base_model: str,
    word: str | None,
    options: dict[str, Any],
    *,
    finished: Finished,
    hub: Hub,
    vault: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bases are folders of the working folder here, by their Hub names; the rest is as it is
    for a reader."""
    weights = finished(base_model, word, **options)
    assert publish(weights, "me/fox", Secret(hub.token)) == f"{hub.url}/me/fox"
    card = hub.files["me/fox"]["README.md"].decode()
    work = tmp_path / "work"
    work.mkdir()
    for organisation in vault.iterdir():
        (work / organisation.name).symlink_to(organisation)
    monkeypatch.chdir(work)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = code_of(card)
    assert not re.search(r"\b(adapters|families|inference|trainer)\b", code)
    exec(compile(code, "the card", "exec"), {})

    with Image.open("image.png") as theirs:
        ours, plain = generated_by_us(weights, options, options | {"lora_scale": 0.0})
        assert difference(theirs, ours) <= 1
        assert difference(theirs, plain) > 30  # so it is the LoRA's picture


def test_the_card_of_several_subjects_inserts_every_token(
    finished: Finished, hub: Hub, vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = finished(others=["<kul>"])
    publish(weights, "me/fox", Secret(hub.token))
    card = hub.files["me/fox"]["README.md"].decode()
    assert "placeholder-2.safetensors" in hub.files["me/fox"]
    assert 'instance_prompt: "<zwx>, <kul>"' in card
    for organisation in vault.iterdir():
        (tmp_path / organisation.name).symlink_to(organisation)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exec(compile(code_of(card), "the card", "exec"), {})
    with Image.open("image.png") as theirs:
        (ours,) = generated_by_us(weights, {"prompt": f"{PROMPT} and <kul>"})
        assert difference(theirs, ours) <= 1


@pytest.mark.parametrize(
    ("base_model", "others", "options"),
    [
        ("qwen-image-edit-2511", ["<kul>"], {"guidance_scale": 4.0}),
        ("qwen-image-2.1", [], {}),
    ],
)
def test_the_card_of_pairs_edits_as_we_do(
    base_model: str,
    others: list[str],
    options: dict[str, Any],
    *,
    finished: Finished,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two control images, with all tokens. Only the pipeline's processor is made here, without
    its part for videos, which needs torchvision."""
    edge = 80  # pixels, of references
    base = find_base(base_model)
    write = write_qwen_image_edit if base.needs_references else write_qwen_image_21
    folder = write(tmp_path / "models") / base.hub_id
    monkeypatch.setenv("MODEL_VAULT", str(tmp_path / "models"))
    monkeypatch.setattr(Base, "reference_resolution", edge)
    seen = replace(QwenImage.reference_format, seen_pixels=100**2)
    monkeypatch.setattr(QwenImage, "reference_format", seen)
    monkeypatch.setattr(edit_plus, "CONDITION_IMAGE_SIZE", 100**2)
    monkeypatch.setattr(edit_plus, "VAE_IMAGE_SIZE", edge**2)
    weights = finished(base_model, others=others, controls=["control/1.png", "control_2/1.png"])
    publish(weights, "me/fox", Secret(hub.token))
    card = hub.files["me/fox"]["README.md"].decode()
    assert "--reference-images image.jpg image-2.jpg\n" in card

    classes = family_of(base).classes
    pipeline: Any = getattr(diffusers, classes.editing_pipeline or classes.pipeline)
    processor = StockProcessor(
        Qwen2Tokenizer.from_pretrained(folder / "processor"),
        Qwen2VLImageProcessorPil.from_pretrained(folder / "processor"),
    )

    def loaded(name: str, dtype: torch.dtype) -> Any:
        assert name == base.hub_id
        parts: dict[str, Any] = {
            "text_encoder": getattr(transformers, classes.text_encoder),
            "transformer": getattr(diffusers, classes.transformer),
            "vae": getattr(diffusers, classes.vae),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
        }
        if base.needs_references:
            parts["tokenizer"] = Qwen2Tokenizer
        made = {part: each.from_pretrained(folder / part) for part, each in parts.items()}
        return pipeline(**made, processor=processor)

    monkeypatch.setattr(pipeline, "from_pretrained", loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("image.jpg", "image-2.jpg")):
        Image.effect_noise((60 + 20 * number, 60), 90).convert("RGB").save(name)
    exec(compile(code_of(card), "the card", "exec"), {})
    references = [Image.open(name) for name in ("image.jpg", "image-2.jpg")]
    request = {"prompt": " and ".join((PROMPT, *others)), "reference_images": references, **options}
    with Image.open("edited.png") as theirs:
        ours, plain = generated_by_us(weights, request, request | {"prompt": "a photo"})
        assert difference(theirs, ours) <= 1
        assert difference(theirs, plain) > 1


def test_the_card_has_what_the_hub_reads(finished: Finished, hub: Hub) -> None:
    publish(finished(), "me/fox", Secret(hub.token))
    files = hub.files["me/fox"]
    _, front, text = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "Tongyi-MAI/Z-Image-Turbo",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "diffusers", "template:sd-lora"],
        "instance_prompt": "<zwx>",
        "widget": [{"text": PROMPT, "output": {"url": "samples/00.png"}}],
    }
    assert set(files) == {
        *("README.md", "pytorch_lora_weights.safetensors", "placeholder.safetensors"),
        *("weights.zip", "samples/00.png", "report.html"),
    }
    assert "| adapter | LoRA of rank 4 |" in text and "| seed | 5 |" in text
    assert hub.private == {"me/fox": True}


def test_the_uploaded_files_are_read_by_us(finished: Finished, hub: Hub, tmp_path: Path) -> None:
    from adapters.archive import read_loose

    weights = finished()
    publish(weights, "me/fox", Secret(hub.token))
    for name, content in hub.files["me/fox"].items():
        if "/" not in name:
            (tmp_path / name).write_bytes(content)
    whole = read_archive(tmp_path / "weights.zip")
    loose = read_loose(tmp_path / "pytorch_lora_weights.safetensors", WORD)
    assert whole.placeholder is not None and loose.placeholder is not None
    assert torch.equal(whole.placeholder.vectors, loose.placeholder.vectors)
    assert whole.factors.keys() == loose.factors.keys()


@pytest.mark.parametrize(
    ("kind", "readers"), [("lokr", "ComfyUI and ai-toolkit read"), ("loha", "ComfyUI reads")]
)
def test_the_card_of_a_lokr_and_a_loha_names_the_programs_that_read_it(
    kind: str, readers: str
) -> None:
    meta = {
        **{"base_model": "Tongyi-MAI/Z-Image-Turbo", "placeholder_token": WORD, "steps": 3},
        **{"adapter": kind, "rank": 4, "settings": {}},
    }
    card = model_card("me/fox", meta, [])
    assert f"{readers} `pytorch_lora_weights.safetensors`" in card
    assert "load_lora_weights" not in card and "library_name" not in card
    assert "folder `comfyui`" in card and "python -m inference" in card
    assert "load_lora_weights" in model_card("me/fox", meta | {"adapter": "dora"}, [])


def test_a_base_that_was_a_folder_has_a_card_without_its_path() -> None:
    meta = {"base_model": "my-finetune", "base_family": "z_image", "settings": {"seed": 1}}
    card = model_card("me/fox", meta, [])
    assert "base_model:" not in card.split("---\n", 2)[1]  # it is not on the Hub
    assert "from_pretrained('my-finetune'" in code_of(card)
    compile(code_of(card), "the card", "exec")
