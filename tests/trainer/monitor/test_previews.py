"""Previews show what the finished archive draws, and training does not notice them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adapters.archive import read_archive
from adapters.formats.lora_file import as_written
from adapters.lora import Lora
from adapters.turbo import TurboAdapter
from families.loading import load_family
from families.registry import BASES
from families.repository import adapter_path
from families.weights import whole
from inference.engine import Engine
from inference.request import Request
from trainer.monitor.contact_sheet import CELL, make_sheet
from trainer.monitor.inference_weights import InferenceWeights, NoRoom
from trainer.run import train
from trainer.settings.fields import Settings

SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}


@pytest.fixture
def miniature(small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Settings of a short training on the embedded miniature, with all that makes previews hard:
    a turbo adapter, a placeholder, and averaged weights."""
    monkeypatch.delenv("MODEL_VAULT")

    def make(**changes: Any) -> Settings:
        values = {
            "base_model": "miniature-turbo",
            "steps": 4,
            "batch_size": 2,
            "ema_decay": 0.5,
            "validation_every": 0,
            "sample_prompts": ("a photo of <zwx>", "a star in the desert"),
            "sample_options": {"num_inference_steps": 2},
        }
        return small(**(values | changes))

    yield make


def preview(weights: Path, step: int, name: str = "00") -> Image.Image:
    return Image.open(weights.parent / "samples" / f"step-{step:06d}" / f"{name}.png")


def archive_draws(weights: Path, *requests: Request) -> list[Image.Image]:
    engine = Engine()
    archive = engine.read(weights)
    return [engine.generate(request, archive)[0] for request in requests]


def test_the_last_preview_is_what_the_archive_draws_on_a_turbo_base(
    miniature: Callable[..., Settings],
) -> None:
    settings = miniature(sample_every=2)
    weights = train(settings)
    requests = [
        Request(prompt=prompt, seed=settings.seed, num_inference_steps=2, apply_lora="always")
        for prompt in settings.sample_prompts
    ]
    for number, generated in enumerate(archive_draws(weights, *requests)):
        assert preview(weights, 4, f"{number:02d}").tobytes() == generated.tobytes()
    # The averages of two steps are not yet those of four, and the base knows no subject.
    pictures = {preview(weights, step).tobytes() for step in (0, 2, 4)}
    assert len(pictures) == 3

    check = next(g for g in read_archive(weights).meta["checks"] if "preview" in g["name"])
    assert (check["state"], check["value"]) == ("passed", 0)


def test_the_last_preview_is_what_the_archive_draws_with_guidance_and_a_strength(
    small: Callable[..., Settings],
) -> None:
    options = {**SMALL, "lora_scale": 0.7, "guidance_scale": 3.0, "seed": 11}
    settings = small(
        base_model="qwen-image",
        validation_every=0,
        learning_rate=1e-2,
        sample_prompts=("<zwx>",),
        sample_options=options,
    )
    weights = train(settings)
    asked = Request(prompt="<zwx>", **options)
    same, stronger = archive_draws(weights, asked, asked.replace(lora_scale=1.0))
    assert preview(weights, 3).tobytes() == same.tobytes() != stronger.tobytes()


def test_training_does_not_notice_its_previews(
    miniature: Callable[..., Settings], tmp_path: Path
) -> None:
    """Nor does it notice the validation: the weights are the same, bit for bit."""
    watched = train(miniature(sample_every=1, validation_every=1, output_dir=tmp_path / "a"))
    alone = train(miniature(sample_prompts=(), output_dir=tmp_path / "b"))
    one, other = read_archive(watched), read_archive(alone)
    assert one.placeholder is not None and other.placeholder is not None
    assert torch.equal(one.placeholder.vectors, other.placeholder.vectors)
    for layer, pair in one.factors.items():
        assert all(map(torch.equal, pair, other.factors[layer])), layer


def test_the_stage_puts_every_weight_and_layer_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    base = BASES["miniature-turbo"]
    family = load_family(base)
    turbo = TurboAdapter.read(adapter_path(base.training_adapters["v1"]))
    original = {k: v.clone() for k, v in family.transformer.state_dict().items()}
    inference_weights = InferenceWeights(family, turbo)
    turbo.merge(family.transformer, base.name)
    lora = Lora(family.transformer, family.lora_targets(), 2, 0)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
    training = {k: v.clone() for k, v in family.transformer.state_dict().items()}
    modules = dict(family.transformer.named_modules())

    with inference_weights.applied(lora, as_written(lora.deltas()), 0.0):
        _ = family.vae
        held = family.transformer.state_dict()
        assert held.keys() == original.keys()
        assert all(torch.equal(held[name], original[name]) for name in original)
    with (
        pytest.raises(KeyboardInterrupt),
        inference_weights.applied(lora, as_written(lora.deltas())),
    ):
        held = family.transformer.state_dict()
        changed = [name for name in original if not torch.equal(held[name], original[name])]
        assert {name.removesuffix(".weight") for name in changed} == set(lora.layers)
        raise KeyboardInterrupt

    after = family.transformer.state_dict()
    assert after.keys() == training.keys()
    assert all(torch.equal(after[name], training[name]) for name in training)
    assert dict(family.transformer.named_modules()) == modules
    assert "vae" not in vars(family)  # it was not there before, and has left again

    assert inference_weights.restored(lora) is family
    after = family.transformer.state_dict()
    assert after.keys() == original.keys()
    assert all(torch.equal(after[name], original[name]) for name in original)


def test_a_base_whose_original_weights_are_lost_is_loaded_again_for_the_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    base = BASES["miniature-turbo"]
    family = load_family(base)
    turbo = TurboAdapter.read(adapter_path(base.training_adapters["v1"]))
    inference_weights = InferenceWeights(family, turbo, copies=False)
    turbo.merge(family.transformer, base.name)
    lora = Lora(family.transformer, family.lora_targets(), 2, 0)
    assert inference_weights.restored(lora) is None


def test_original_weights_that_were_not_kept_are_read_again_for_an_image_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    base = BASES["miniature-turbo"]
    family = load_family(base)
    turbo = TurboAdapter.read(adapter_path(base.training_adapters["v1"]))
    original = {k: v.clone() for k, v in family.transformer.state_dict().items()}
    inference_weights = InferenceWeights(family, turbo, copies=False)
    turbo.merge(family.transformer, base.name)
    lora, transformer = Lora(family.transformer, family.lora_targets(), 2, 0), family.transformer
    with monkeypatch.context() as patch:
        patch.setattr("trainer.monitor.inference_weights.free_memory", lambda _: 1 << 20)
        with pytest.raises(NoRoom, match="images need the original weights, 0.0 GB of CPU memory"):
            inference_weights.prepare()
    inference_weights.prepare()
    assert family.transformer is transformer
    assert inference_weights.restored(lora) is family
    after = family.transformer.state_dict()
    assert all(torch.equal(after[name], original[name]) for name in original)


def test_prompts_without_a_placeholder_are_read_before_the_text_encoder_leaves(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many previews follow, it is loaded for the captions and for the checks alone.

    The transformer is loaded once: the checks use the one in memory.
    """
    loaded = []

    def count(model_class: Any, *given: Any, **options: Any) -> Any:
        loaded.append(model_class.__name__)
        return whole(model_class, *given, **options)

    monkeypatch.setattr("families.components.whole", count)
    options = {**SMALL, "guidance_scale": 2.0, "negative_prompt": "blurry"}
    plain = {"train_placeholder_token": False, "trigger_word": "r3dfox"}
    common = {**plain, "validation_every": 0, "sample_every": 1}
    train(small(sample_prompts=("a cat", "a dog"), sample_options=options, **common))
    assert loaded.count("Qwen3Model") == 2
    assert loaded.count("ZImageTransformer2DModel") == 1


def test_a_gpu_too_small_for_a_preview_does_not_end_the_training(
    miniature: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("trainer.monitor.previews.generate", full)
    weights = train(miniature(steps=3, sample_every=1))
    assert "no preview at step 2: out of memory" in caplog.text
    # Once the training's memory is given back there is room, and the end is drawn after all.
    assert [each.name for each in (weights.parent / "samples").iterdir() if each.is_dir()] == [
        "step-000003"
    ]


def test_a_resumed_run_goes_on_with_the_sheet_of_its_first_part(
    miniature: Callable[..., Settings],
) -> None:
    common: dict[str, Any] = {"sample_every": 2, "lr_scheduler": "constant"}
    weights = train(miniature(steps=4, checkpoint_every=2, **common))
    folder = weights.parent
    first = (folder / "samples" / "step-000002" / "01.png").read_bytes()
    checkpoint = folder / "checkpoints" / "step-000002.safetensors"
    train(miniature(steps=6, resume_from=checkpoint, **common))
    steps = sorted(each.name for each in (folder / "samples").glob("step-*"))
    assert steps == [f"step-00000{step}" for step in (0, 2, 4, 6)]
    assert (folder / "samples" / "step-000002" / "01.png").read_bytes() == first
    with Image.open(folder / "samples" / "sheet.png") as sheet:
        assert sheet.height > 4 * CELL
        assert sheet.width > 2 * CELL


def test_the_sheet_shows_every_picture_at_its_place() -> None:
    colours = [[(250, 0, 0), (0, 250, 0)], [(0, 0, 250), (250, 250, 0)]]
    rows = [
        (f"{step}", [Image.new("RGB", (16, 16), colour) for colour in row])
        for step, row in enumerate(colours)
    ]
    sheet = make_sheet(rows, ["a short prompt", "a very long prompt, " * 20])
    found = {colour: (x, y) for x, y, colour in _blocks(sheet)}
    red, green, blue, yellow = (found[colour] for row in colours for colour in row)
    assert red[0] == blue[0] < green[0] == yellow[0]
    assert red[1] == green[1] < blue[1] == yellow[1]


def _blocks(sheet: Image.Image) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Every 8th pixel from the bottom right, so that each colour's first block wins."""
    for y in range(sheet.height - 1, 0, -8):
        for x in range(sheet.width - 1, 0, -8):
            yield x, y, sheet.getpixel((x, y))  # type: ignore[misc]
