"""Prompts without the subject keep their images: what preservation trains, and that it helps."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loops import make_loop
from root import ROOT

from adapters.archive import Archive, read_archive
from miniature.world import caption, sample_scene
from trainer import run
from trainer.data.dataset import read_dataset
from trainer.learning import loop as loops
from trainer.learning import preservation
from trainer.learning.checkpoint import read_checkpoint
from trainer.learning.features import Captions
from trainer.learning.loop import Loop
from trainer.learning.preservation import (
    Preservation,
    Prompts,
    preservation_prompts,
    shipped_prompts,
)
from trainer.learning.preservation_targets import generated
from trainer.learning.resume import read_resume
from trainer.memory.fitting import figures_of
from trainer.memory.plan import Mode
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import TrainingInputs

KEPT = "subject_weights", "parameters"  # of a checkpoint
TINY: dict[str, Any] = {"base_model": "miniature-turbo", "batch_size": 2, "learning_rate": 1e-2}


def settings_of(base: str = "miniature-turbo", **given: Any) -> Settings:
    return resolve(TrainingInputs(**{"dataset": "imgs.zip", "base_model": base, "seed": 1} | given))


def preserved(
    settings: Settings, images: int | None = 1, others: Sequence[str] = ()
) -> tuple[Loop, Preservation]:
    """A loop with preservation, made in the order of a run; it knows the prompts `others`, too."""
    loop = make_loop(settings, images)
    family, lora, prompts = loop.family, loop.lora, preservation_prompts(settings)
    assert lora is not None
    texts = [sample.caption for sample in loop.samples]
    vectors = {each.token: each.vectors for each in loop.placeholders}
    loop.captions = Captions(family, texts, vectors, [*prompts.all, *others])
    with lora.lifted():  # as before it is added
        loop.preservation = Preservation(family, settings, loop.captions, prompts)
    return loop, loop.preservation


def assert_same(one: Archive, other: Archive) -> None:
    assert one.factors.keys() == other.factors.keys()
    for layer, factors in one.factors.items():
        assert all(map(torch.equal, factors, other.factors[layer])), layer
    assert one.placeholder is not None and other.placeholder is not None
    assert torch.equal(one.placeholder.vectors, other.placeholder.vectors)


# ---- Rows ----------------------------------------------------------------------------------------


def test_the_targets_are_the_bases_answers_and_the_rows_hold_no_token(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a LoRA that changes nothing yet, the loss is zero but for rounding in other batches."""
    settings = small(**TINY | {"batch_size": 4}, preserve="auto")
    loop, kept = preserved(settings)
    assert len(kept.others) == kept.extent.images * kept.extent.steps == 64
    asked: list[str] = []
    features = loop.captions.features
    monkeypatch.setattr(
        kept.captions, "features", lambda x, *more: asked.extend(x) or features(x, *more)
    )
    with torch.no_grad():
        assert max(kept.loss(number).item() for number in range(8)) < 1e-9
    assert asked and settings.subject is not None
    assert (
        not any(settings.subject in each for each in asked) and not {*asked} & loop.captions.trained
    )
    loop.step(0)
    loop.step(1)
    with torch.no_grad():
        assert kept.loss(0).item() > 1e-7  # the LoRA now changes them


def test_rows_depend_on_seed_and_batch_alone_and_processes_share_them(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(**TINY | {"batch_size": 4}, preserve="auto")
    loop, kept = preserved(settings)
    prompts = preservation_prompts(settings)
    again = generated(loop.family, loop.captions, prompts.others, kept.extent, settings.batch_size)
    for one, other in zip(kept.others, again, strict=True):
        assert (one.prompt, one.sigma) == (other.prompt, other.sigma)
        assert torch.equal(one.latents_CHW, other.latents_CHW)
        assert torch.equal(one.velocity_CHW, other.velocity_CHW)
    loop.step(0)
    with torch.no_grad():
        assert torch.equal(kept.loss(3), kept.loss(3))
        assert not torch.equal(kept.loss(3), kept.loss(4))
        parts = []
        for rank in range(2):
            here = SimpleNamespace(num_processes=2, process_index=rank)
            monkeypatch.setattr(preservation, "processes", lambda here=here: here)
            parts.append(kept.loss(3).item())
        monkeypatch.undo()
        kept.extent = replace(kept.extent, rows=2 * kept.extent.rows)  # of the whole batch
        assert parts[0] != parts[1]
        assert sum(parts) / 2 == pytest.approx(kept.loss(3).item(), rel=1e-5)


def test_rows_add_their_weighted_gradient_to_the_batchs(small: Callable[..., Settings]) -> None:
    """In every second batch with twice the weight, where rows are as large as a batch of one."""
    settings = small(base_model="miniature-turbo", preserve=0.5, batch_size=1, learning_rate=1e-2)
    loop, kept = preserved(settings)
    assert kept.extent.every == 2
    loop.step(0)
    layers = loop.lora_parameters
    kept.generate_subject(loop.named)
    alone = torch.autograd.grad(kept.loss(2), layers)
    loop.preservation = None
    loop._gradients([2, 3])
    plain = [each.grad.clone() for each in layers if each.grad is not None]
    loop._drop_gradients()
    loop.preservation = kept
    loop._gradients([2, 3])  # the mean of two batches, of which the first has rows
    for layer, before, added in zip(layers, plain, alone, strict=True):
        assert layer.grad is not None
        assert torch.allclose(layer.grad, before + 0.5 * 2 / 2 * added, rtol=1e-4, atol=1e-8)


def test_rows_begin_after_a_fifth_of_the_steps_with_images_of_the_subject_of_that_moment(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one row in four is of the subject, which trains its token, too."""
    settings = small(**TINY | {"batch_size": 8, "steps": 10}, preserve="auto")
    loop, kept = preserved(settings)
    loop.step(0)
    loop.step(1)
    assert kept.last is None and kept.subject == [] and kept.subject_weights == {}
    weights = {name: value.detach().clone() for name, value in loop.named.items()}
    loop.step(2)
    assert kept.last is not None
    assert all(torch.equal(kept.subject_weights[name], weights[name]) for name in weights)
    prompts = kept.prompts.subject
    assert len(kept.subject) == len(prompts) * kept.extent.steps
    assert all("<zwx>" in each.prompt for each in kept.subject)

    asked: list[str] = []
    features = loop.captions.features
    monkeypatch.setattr(
        kept.captions, "features", lambda x, *more: asked.extend(x) or features(x, *more)
    )
    (row,) = loop.rows
    for number in range(2, 6):
        (gradient,) = torch.autograd.grad(kept.loss(number), [row])
        assert gradient.abs().max() > 0
    assert [each in prompts for each in asked] == [True, False, False, False] * 4


def test_processes_average_the_token_that_only_rows_of_the_subject_have(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has rows of its own."""
    two = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    averaged: list[set[int]] = []
    monkeypatch.setattr(loops, "processes", lambda: two)
    monkeypatch.setattr(
        loops, "mean_of_all", lambda loss, of: averaged.append({*map(id, of)}) or loss
    )
    settings = small(**TINY, preserve="auto", caption_dropout=1.0)
    loop, kept = preserved(settings)
    loop.step(0)  # of one: the rows begin at once
    assert kept.subject and loop.rows[0].grad is None
    assert id(loop.rows[0]) in averaged[0]
    kept.subject, kept.prompts = [], Prompts(kept.prompts.others)
    loop.step(1)
    assert id(loop.rows[0]) not in averaged[1]


# ---- Runs ----------------------------------------------------------------------------------------


def test_off_trains_what_a_loop_without_preservation_does(small: Callable[..., Settings]) -> None:
    settings = small(validation_every=0, preserve="off")
    trained = read_archive(run.train(settings))
    loop = make_loop(settings)
    loop.run()
    factors, _ = loop.final_weights()
    for layer, (down, up) in trained.factors.items():  # saved in bfloat16
        ours = (each.bfloat16().float() for each in factors[layer])
        assert all(map(torch.equal, (down, up), ours)), layer


@pytest.mark.slow
def test_a_resumed_run_with_preservation_equals_an_uninterrupted_one(
    small: Callable[..., Settings], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given: dict[str, Any] = {"preserve": "auto", "steps": 5, "learning_rate": 1e-2}
    settings = small(**given, checkpoint_every=1, validation_every=0)
    whole = read_archive(run.train(settings))
    assert 0 < whole.meta["training"]["preservation_last"] < 100
    early = settings.output_dir / "checkpoints" / "step-000004.safetensors"  # type: ignore[operator]
    held, parameters = (getattr(read_checkpoint(early), name) for name in KEPT)
    assert held.keys() == parameters.keys()
    assert not all(torch.equal(held[name], parameters[name]) for name in held)
    events = (early.parents[1] / "events.jsonl").read_text()
    for count in (8, 3):
        assert f'"name":"images for preservation","done":{count},"of":{count}' in events
    resumed = settings.replace(resume_from=early, output_dir=tmp_path / "resumed")
    assert_same(read_archive(run.train(resumed)), whole)
    assert "resuming with changed settings" not in caplog.text
    read_resume(resumed.replace(preserve=1.0), read_dataset(settings.dataset, "<zwx>"))
    assert "resuming with changed settings: preserve 0.5 -> 1.0" in caplog.text


@pytest.mark.slow
def test_new_prompts_without_the_token_change_less_with_preservation() -> None:
    """The miniature's velocity for prompts of its world, after 30 steps on the demo's images."""
    prompts = [caption(sample_scene(n, "train"), random.Random(n)) for n in range(16)]
    assert not {*prompts} & {*shipped_prompts("shapes")}
    changes = []
    for weight in (0.0, 0.1, 1.0):
        given: dict[str, Any] = {"dataset": ROOT / "demo" / "subject.zip", "batch_size": 4}
        settings = settings_of("miniature", steps=30, preserve=weight or "auto", **given)
        loop, kept = preserved(settings, None, prompts)
        assert loop.lora is not None
        if not weight:
            loop.preservation = None
        loop.run()
        with loop.lora.lifted():
            kept.others = generated(loop.family, loop.captions, prompts, kept.extent, 16)
        kept.subject = []
        with torch.no_grad():
            changes.append(sum(kept.loss(number).item() for number in range(32)))
    assert changes[1] < 0.95 * changes[0]
    assert changes[2] < 0.7 * changes[0]


# ---- Plan ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "given"),
    [
        pytest.param("z-image-turbo", {}, marks=pytest.mark.slow, id="published"),
        pytest.param("z-image", {"resolution": 64, "batch_size": 4, "rank": 2}, id="small"),
    ],
)
def test_the_plan_counts_the_rows_time_and_no_more_memory(
    base: str, given: dict[str, Any], use_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not given:
        monkeypatch.delenv("MODEL_VAULT")
    without, with_rows = (
        figures_of(settings_of(base, preserve=each, **given), 128, torch.bfloat16)
        for each in ("off", "auto")
    )
    for mode in (Mode(), Mode(checkpointing=True)):
        assert with_rows.parts(mode) == without.parts(mode)
        assert 1.1 < with_rows.flops(mode) / without.flops(mode) < 1.55
    assert with_rows.preservation.images > 0 == without.preservation.images
