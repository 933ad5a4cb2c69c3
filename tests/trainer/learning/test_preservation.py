"""Prompts without the subject keep their images: what preservation trains, and that it helps."""

import random
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loops import make_loop
from root import ROOT

from adapters.archive import Archive, read_archive
from families.registry import BASES
from families.tokens import mentions
from miniature.world import caption, sample_scene
from trainer import run
from trainer.data.dataset import read_dataset
from trainer.learning import loop as loops
from trainer.learning.checkpoint import read_checkpoint
from trainer.learning.features import Captions
from trainer.learning.loop import Loop
from trainer.learning.preservation import (
    Preservation,
    Prompts,
    generated,
    preservation_prompts,
    shipped_prompts,
)
from trainer.learning.resume import read_resume
from trainer.memory.fitting import figures_of
from trainer.memory.plan import Mode
from trainer.settings import BEGINS, extent_of, sort_prompts
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs
from trainer.settings.request_cost import too_much

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


# ---- Settings ------------------------------------------------------------------------------------


def test_auto_is_the_bases_weight_and_off_without_a_subject() -> None:
    assert settings_of().preserve == BASES["miniature-turbo"].preservation
    for off in ("off", " OFF ", False):
        assert settings_of(preserve=off).preserve == 0
    style = {"train_placeholder_token": False}
    assert settings_of(**style).preserve == 0
    assert settings_of(**style, trigger_word="fox").preserve > 0
    assert (
        settings_of(**style, preserve=0.5).preserve == settings_of(preserve="0.5").preserve == 0.5
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preserve": 0}, "preserve is 0; it must be between 1e-06 and 10; off switches it off"),
        ({"preserve": 11}, "preserve is 11; it must be between"),
        ({"preserve": "nan"}, "preserve is nan; it must be between"),
        ({"preserve": "strong"}, "preserve is 'strong'; it must be auto, off, or a number above"),
        ({"preserve": True}, "preserve is True; it must be auto, off, or a number"),
        ({"preserve_prompts": []}, "preserve_prompts is empty; remove it.*or set preserve to off"),
        ({"preserve_prompts": " \n"}, "preserve_prompts is empty"),
        ({"preserve_prompts": "prompts.txt"}, "looks like a file; give the prompts themselves"),
        ({"preserve_prompts": "/data/my.yaml"}, "looks like a file"),
        ({"preserve_prompts": ["a"] * 1001}, "has 1,001 prompts; at most 1,000 are accepted"),
        ({"preserve_prompts": ["a", "b" * 1001]}, "prompt 2 has 1,001 characters; at most 1,000"),
        (
            {
                "preserve_prompts": ["a", "TOK at night"],
                **{"train_placeholder_token": False, "preserve": 0.5},
            },
            "prompt 2 'TOK at night': TOK stands for the subject, but no placeholder token",
        ),
        ({"preserve_prompts": "a", "preserve": "off"}, "preserve is off; remove them, or set"),
        (
            {"preserve_prompts": "a", "train_placeholder_token": False},
            "auto, which is off without a placeholder token or trigger_word",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_what_to_do(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        settings_of(**given)


def test_a_yaml_file_may_say_off_as_yaml_reads_it(tmp_path: Path) -> None:
    from trainer.settings.config import read_config

    file = tmp_path / "run.yaml"
    for text, weight in (("off", 0), ("0.5", 0.5), ("2", 2), ("auto", 0.5)):
        file.write_text(f"base_model: miniature\ndataset: a.zip\ntrain:\n  preserve: {text}\n")
        assert read_config(file).preserve == weight
    file.write_text("base_model: miniature\ndataset: a.zip\ntrain:\n  preserve_prompts: [a b, c]\n")
    assert read_config(file).preserve_prompts == ("a b", "c")


@pytest.mark.parametrize(
    ("given", "wanted"),  # edge, images, of the subject, steps, rows, batches between two with rows
    [
        ({"base": "z-image-turbo", "steps": 1000}, (512, 128, 48, 8, 1, 1)),
        ({"base": "z-image-turbo", "steps": 1000, "resolution": 512}, (512, 36, 14, 8, 1, 2)),
        ({"base": "qwen-image", "steps": 1000}, (512, 64, 24, 12, 1, 1)),
        ({"base": "miniature-turbo", "steps": 500}, (64, 128, 48, 8, 4, 1)),
        ({"base": "miniature-turbo", "steps": 1, "batch_size": 1}, (64, 8, 3, 8, 1, 2)),
        ({"base": "miniature-turbo", "preserve_prompts": "a\nb"}, (64, 2, 48, 8, 4, 1)),
        ({"base": "miniature-turbo", "preserve_prompts": "a\nTOK"}, (64, 1, 1, 8, 4, 1)),
        (
            {
                "base": "miniature-turbo",
                "steps": 500,
                "preserve": 1,
                "train_placeholder_token": False,
            },
            (64, 128, 0, 8, 4, 1),
        ),
    ],
    ids=str,
)
def test_a_run_takes_at_most_six_tenths_longer(
    given: dict[str, Any], wanted: tuple[int, ...]
) -> None:
    """But for the least number of images. Measured by the plan's FLOPs in `docs/memory.md`."""
    settings = settings_of(**given)
    extent = extent_of(settings)
    assert astuple(extent) == wanted
    size = (extent.side / max(settings.resolutions)) ** 2
    rows = extent.rows * size / extent.every / settings.batch_size
    trained = settings.steps * settings.batch_size
    assert rows <= 0.5
    if trained and extent.images > 8:  # nine tenths of a step are the transformer's
        images = (extent.images + extent.subject_images) * extent.steps * size / 2 / trained
        assert 0.9 * ((1 - BEGINS) * rows + images) <= 0.6


def test_the_rows_count_in_what_a_request_may_cost() -> None:
    given: dict[str, Any] = {"base": "z-image", "steps": 93_000, "batch_size": 2}
    given |= {"checkpoint_every": 93_000}
    assert too_much(settings_of(**given, preserve="off")) == []
    (said,) = too_much(settings_of(**given))
    assert "186,000 images, which is too much" in said and "at most 181,818 are accepted" in said


# ---- Prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_every_base_has_varied_prompts_without_and_with_the_subject(base: str) -> None:
    prompts = shipped_prompts(BASES[base].preservation_prompts)
    assert len(set(prompts)) == len(prompts)
    assert all(each.strip() == each != "" for each in prompts)
    others, of_subject = sort_prompts(prompts, settings_of(base))
    assert (len(others), len(of_subject)) == (128, 48)
    assert not any(word in each for each in others for word in ("TOK", "<", "["))
    assert all(each.count("<zwx>") == 1 and "TOK" not in each for each in of_subject)


def test_the_prompts_are_in_the_wheel() -> None:
    from setuptools import find_namespace_packages

    assert "trainer.learning.preservation_prompts" in find_namespace_packages(
        str(ROOT), include=["trainer*"]
    )


def test_prompts_with_the_trigger_word_are_prompts_of_the_subject() -> None:
    given: dict[str, Any] = {"train_placeholder_token": False, "trigger_word": "Triangle"}
    shipped = [each for each in shipped_prompts("shapes") if "TOK" not in each]
    assert any(mentions(each, "triangle") for each in shipped)
    prompts = preservation_prompts(settings_of(**given))
    assert list(prompts.others) == [each for each in shipped if not mentions(each, "triangle")]
    assert len(prompts.subject) == 48
    assert all(mentions(each.lower(), "triangle") for each in prompts.subject)


def test_own_prompts_replace_the_shipped_ones_of_their_kind_and_spread_over_the_list() -> None:
    own = [f"number {n}" for n in range(100)]
    few: dict[str, Any] = {"steps": 1, "batch_size": 1}
    prompts = preservation_prompts(settings_of(preserve_prompts=own, **few))
    assert prompts.others == tuple(f"number {n}" for n in (0, 12, 25, 37, 50, 62, 75, 87))
    assert len(prompts.subject) == 3 and "at sea, a yellow <zwx> on the left" in prompts.subject
    prompts = preservation_prompts(settings_of(preserve_prompts=["a blue TOK"], **few))
    assert len(prompts.others) == 8 and prompts.subject == ("a blue <zwx>",)
    assert preservation_prompts(settings_of(preserve="off")) == Prompts()


def test_of_several_subjects_each_is_in_its_share_of_the_prompts() -> None:
    prompts = preservation_prompts(settings_of(subjects="<a>,<b>,<c>"))
    for token in ("<a>", "<b>", "<c>"):
        assert sum(token in each for each in prompts.subject) == 16


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
    monkeypatch.setattr(kept.captions, "features", lambda x: asked.extend(x) or features(x))
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


def test_rows_depend_on_seed_batch_and_process_alone(small: Callable[..., Settings]) -> None:
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
        assert not torch.equal(kept.loss(3, first_row=0), kept.loss(3, first_row=4))


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
    monkeypatch.setattr(kept.captions, "features", lambda x: asked.extend(x) or features(x))
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
