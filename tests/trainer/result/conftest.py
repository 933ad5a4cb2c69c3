"""A Hub on this machine, and weights to upload."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import PROMPT, WORD
from hub_server import Hub
from PIL import Image

from adapters.archive import Archive, write_archive
from adapters.placeholder import Placeholder
from families.loading import load_family
from families.registry import find_base

Finished = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine in the place of the real one."""
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
        yield hub


@pytest.fixture
def finished(use_vault: Path, tmp_path: Path) -> Finished:
    """A weights.zip as a training leaves it, with a LoRA that shows, a sample and a report."""

    def make(
        base_model: str = "z-image-turbo",
        word: str | None = WORD,
        others: Sequence[str] = (),
        controls: Sequence[str] = (),
        **options: Any,
    ) -> Path:
        base = find_base(base_model)
        family = load_family(base, torch.device("cpu"), torch.float32)
        generator = torch.Generator().manual_seed(0)
        layers = dict(family.transformer.named_modules())
        factors = {}
        for name in family.lora_targets():
            rows, columns = layers[name].weight.shape
            down, up = (
                torch.randn(4, columns, generator=generator),
                torch.randn(rows, 4, generator=generator),
            )
            # Rounded as the archive rounds them, so that both sides read the same numbers.
            factors[name] = ((down * 0.1).bfloat16().float(), (up * 0.05).bfloat16().float())
        placeholders: tuple[Placeholder, ...] = ()
        if word is not None:
            vectors = torch.randn(2, family.text_width, generator=generator) * 0.05
            placeholders = (
                Placeholder(word, vectors),
                *(Placeholder(each, vectors * 2) for each in others),
            )
        meta = {
            "base_model": base.hub_id,
            "training_mode": "zero_prior" if word else "baseline",
            "train_placeholder_token": word is not None,
            "placeholder_token": word,
            "rank": 4,
            "steps": 3,
            "settings": {
                "sample_prompts": [" and ".join((PROMPT, *others))],
                "sample_options": {"width": 64, "height": 64, "num_inference_steps": 2} | options,
                "seed": 5,
            },
        }
        if controls:
            meta["dataset"] = {"pictures": [{"controls": controls}], "controls": len(controls)}
        if word is None:
            del meta["placeholder_token"]
        if others:
            meta["placeholder_tokens"] = [word, *others]
        output = tmp_path / "out"
        picture = output / "samples" / "step-000003" / "00.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), "red").save(picture)
        (output / "report.html").write_text("<p>report</p>")
        return write_archive(Archive(factors, placeholders, meta), output / "weights.zip")

    return make
