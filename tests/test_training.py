"""A training learns what it should, touches nothing else, and can be repeated."""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from adapters.archive import read_archive
from adapters.lora import Lora
from adapters.placeholder import Placeholder, PlaceholderError
from families.bases import BASES
from families.family import Family
from families.loading import load_family
from inference.engine import Engine
from inference.request import Request
from trainer.batches import Batches
from trainer.dataset import DatasetError, read_dataset
from trainer.features import Captions, encode_pictures
from trainer.loop import Diverged, Loop
from trainer.loss import flow_loss
from trainer.noise_levels import NoiseLevels
from trainer.optimizers import OPTIMIZERS, rate_at
from trainer.presets import PRESETS, find_preset, steps_for
from trainer.randomness import generator
from trainer.run import train
from trainer.settings import Settings, SettingsError
from trainer.zero_prior import ZeroPriorBroken, ZeroPriorProof, fingerprint

PUBLISHED = ["z-image-turbo", "z-image", "z-image-de-turbo", "qwen-image", "qwen-image-2512"]


@pytest.mark.parametrize("mode", ["zero_prior", "baseline"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_base_trains_and_predicts_without_a_network(
    name: str, mode: str, small: Callable[..., Settings]
) -> None:
    settings = small(base_model=name, train_placeholder_token=mode == "zero_prior")
    archive = read_archive(train(settings))

    meta = archive.meta
    assert (meta["base_model"], meta["training_mode"]) == (BASES[name].hub_id, mode)
    assert (meta["rank"], meta["steps"]) == (2, 3)
    assert meta["train_placeholder_token"] is (mode == "zero_prior")
    assert (archive.placeholder is not None) is (mode == "zero_prior")
    if archive.placeholder is not None:
        known = 151665 if "qwen" in name else 151669
        assert meta["placeholder_token"] == archive.placeholder.token == "<zwx>"
        assert meta["placeholder_token_id"] == known
        assert meta["placeholder_init_std"] == 1e-5
        assert meta["zero_prior"]["norm_start"] == pytest.approx(1e-5 * 64**0.5, rel=0.5)
        assert meta["zero_prior"]["largest_gradient_norm"] > 0
    assert all(up.abs().sum() > 0 for _, up in archive.factors.values())

    engine, asked = Engine(), Request(prompt="a photo of <zwx>", width=64, height=64, seed=1)
    asked = replace(asked, num_inference_steps=2)
    with_weights = engine.draw(asked, archive)[0]
    without = engine.draw(asked, None, name)[0]
    assert with_weights.size == (64, 64)
    assert with_weights.tobytes() != without.tobytes()


def test_a_base_given_by_its_folder_draws_its_samples_from_there(
    small: Callable[..., Settings], vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_VAULT")
    path = train(
        small(
            base_model=str(vault / "Tongyi-MAI/Z-Image"),
            sample_prompts=("<zwx>",),
            sample_options={"width": 64, "height": 64, "num_inference_steps": 2},
        )
    )
    assert (path.parent / "samples" / "step-000003" / "00.png").is_file()


# What is learned.


def prepare(
    settings: Settings, with_lora: bool, with_placeholder: bool
) -> tuple[Family, Loop, Placeholder | None]:
    """A loop over one picture, with the LoRA or the placeholder or both."""
    subject = "<zwx>" if with_placeholder else None
    examples = read_dataset(settings.dataset, settings.default_caption, subject)[:1]
    family = load_family(settings.base)
    samples = encode_pictures(family, examples, settings)
    placeholder = None
    if with_placeholder:
        placeholder = Placeholder.create("<zwx>", family.text_width, 1e-5, settings.seed)
    vectors = {placeholder.token: placeholder.vectors} if placeholder else {}
    captions = Captions(family, [sample.caption for sample in samples], vectors)
    lora = None
    if with_lora:
        lora = Lora(family.transformer, family.lora_targets(), settings.rank, settings.seed)
    return family, Loop(family, settings, samples, captions, lora, placeholder), placeholder


@torch.no_grad()
def fixed_loss(loop: Loop) -> float:
    """The loss over a set of noise levels and noises that training never draws."""
    sample, losses = loop.samples[0], []
    for number, sigma in enumerate((0.2, 0.5, 0.8, 0.95)):
        noise = torch.randn(sample.mean_CHW.shape, generator=generator(1, "held out", number))
        text = loop.captions.features([sample.caption])
        losses.append(
            flow_loss(
                loop.family, sample.mean_CHW[None], noise[None], torch.tensor([sigma]), text
            ).item()
        )
    return sum(losses) / len(losses)


@pytest.mark.parametrize("what", ["lora", "placeholder"])
@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_lora_and_placeholder_each_learn_alone(
    what: str, name: str, small: Callable[..., Settings]
) -> None:
    """Made to overfit one picture, the loss on a fixed set falls: the gradient path is whole."""
    settings = small(
        base_model=name,
        steps=100 if what == "lora" else 60,
        rank=8,
        learning_rate=3e-3,
        placeholder_learning_rate=3e-2,
        caption_dropout=0.0,
        gradient_checkpointing=False,
    )
    _, loop, _ = prepare(settings, what == "lora", what == "placeholder")
    before = fixed_loss(loop)
    loop.run()
    after = fixed_loss(loop)
    assert after < before * (0.8 if what == "lora" else 0.995)


def test_near_zero_rows_do_not_swallow_the_loras_gradient(
    small: Callable[..., Settings],
) -> None:
    """They are clipped apart: the LoRA's clipped gradient is the same with and without rows."""
    settings = small(steps=1, max_grad_norm=1e-3)
    norms = []
    for with_placeholder in (True, False):
        _, loop, _ = prepare(settings, True, with_placeholder)
        seen: list[float] = []

        def note(*_: Any, loop: Loop = loop, seen: list[float] = seen) -> None:
            grads = [p.grad for p in loop.lora_parameters if p.grad is not None]
            seen.append(torch.nn.utils.get_total_norm(grads).item())

        loop.optimizers["lora"].register_step_pre_hook(note)
        loop.step(0)
        norms += seen
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


# What is not touched.


def test_only_the_placeholders_own_row_changes(small: Callable[..., Settings]) -> None:
    settings = small(steps=4, learning_rate=1e-2, caption_dropout=0.0)
    family, loop, placeholder = prepare(settings, True, True)
    assert placeholder is not None
    before = {name: value.clone() for name, value in family.text_encoder.state_dict().items()}
    row = placeholder.vectors.detach().clone()
    proof = ZeroPriorProof(family, placeholder)
    trained = loop.run()

    after = family.text_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(row, placeholder.vectors)
    assert not any(p.requires_grad for p in family.text_encoder.parameters())
    facts = proof.result(trained.row_norms)
    assert facts["placeholder_token_id"] == 151669
    assert facts["text_encoder_tensors_unchanged"] == len(before)


def test_a_single_changed_bit_of_the_text_encoder_breaks_the_proof(use_vault: Path) -> None:
    family = load_family(BASES["z-image"])
    proof = ZeroPriorProof(family, Placeholder.create("<zwx>", family.text_width, 0.0, 0))
    weight = family.text_encoder.get_input_embeddings().weight
    weight.view(torch.int32)[77777, 3] ^= 1
    with pytest.raises(ZeroPriorBroken, match="text encoder changed in 1 tensors"):
        proof.result([0.0, 1.0])
    weight.view(torch.int32)[77777, 3] ^= 1
    with pytest.raises(ZeroPriorBroken, match="zero in every step"):
        proof.result([0.0, 0.0])
    proof.result([0.0, 1.0])


def test_a_training_too_short_to_see_the_placeholder_says_so(
    small: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    train(small(steps=1, caption_dropout=1.0))
    assert "no step saw <zwx>" in caplog.text


def test_two_swapped_values_change_the_fingerprint() -> None:
    module = torch.nn.Linear(3, 1, bias=False)
    before = fingerprint(module)
    module.weight.data = module.weight.data[:, [1, 0, 2]]
    assert fingerprint(module) != before


def test_the_frozen_part_is_one_bfloat16_copy_without_gradients(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("families.loading.default_dtype", lambda device: torch.bfloat16)
    settings = small(steps=1)
    family, loop, _ = prepare(settings, True, True)
    lora = {id(p) for p in loop.lora_parameters}
    frozen = [p for p in family.transformer.parameters() if id(p) not in lora]
    floor = sum(p.numel() * 2 for p in frozen)
    with Float32Copies({tuple(p.shape) for p in frozen if p.numel() > 4096}) as copies:
        loop.step(0)

    assert copies.found == []
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in frozen)
    assert sum(p.untyped_storage().nbytes() for p in frozen) == floor
    assert all(p.dtype == torch.float32 for p in loop.lora_parameters)


class Float32Copies(TorchDispatchMode):
    """Notes every tensor that is made in float32 with the shape of a frozen matrix."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.found = shapes, list[str]()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32:
                if tuple(each.shape) in self.shapes:
                    self.found.append(f"{func} {tuple(each.shape)}")
        return result


def test_removing_the_lora_leaves_the_transformer_as_it_was(use_vault: Path) -> None:
    family = load_family(BASES["z-image"])
    before = {name: p.detach().clone() for name, p in family.transformer.named_parameters()}
    with torch.no_grad():
        text = family.encode_prompts(["a cat"])
    latents, sigma = torch.randn(1, family.latent_channels, 8, 8), torch.tensor([0.5])
    plain = family.velocity(latents, sigma, text)

    lora = Lora(family.transformer, family.lora_targets(), rank=2, seed=0)
    assert torch.equal(family.velocity(latents, sigma, text), plain)  # B starts at zero
    family.velocity(latents, sigma, text).square().sum().backward()
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert not torch.equal(family.velocity(latents, sigma, text), plain)

    lora.remove()
    after = dict(family.transformer.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(family.velocity(latents, sigma, text), plain)


# What can be repeated.


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    small: Callable[..., Settings], tmp_path: Path
) -> None:
    first, again, other = (
        read_archive(train(small(seed=seed, output_dir=tmp_path / folder)))
        for seed, folder in ((5, "a"), (5, "b"), (6, "c"))
    )
    for layer, (down, up) in first.factors.items():
        assert torch.equal(down, again.factors[layer][0])
        assert torch.equal(up, again.factors[layer][1])
    assert first.placeholder is not None and again.placeholder is not None
    assert torch.equal(first.placeholder.vectors, again.placeholder.vectors)
    assert any(
        not torch.equal(up, other.factors[layer][1]) for layer, (_, up) in first.factors.items()
    )


def test_a_seed_that_was_left_out_is_drawn_and_written_down(
    small: Callable[..., Settings],
) -> None:
    settings = [small(seed=None) for _ in range(2)]
    assert settings[0].seed != settings[1].seed
    path = train(settings[0])
    with zipfile.ZipFile(path) as archive:
        meta = json.loads(archive.read("meta.json"))
    assert meta["settings"]["seed"] == settings[0].seed
    assert str(path.parent) not in json.dumps(meta)  # where things lay is nobody's business


def test_a_batch_depends_on_its_step_alone(small: Callable[..., Settings]) -> None:
    settings = small(batch_size=2, steps=10)
    _, loop, _ = prepare(settings, False, True)
    late = loop.batch(7)
    for step in range(7):
        loop.batch(step)
    for ours, theirs in zip(loop.batch(7), late, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_every_epoch_shows_every_sample_and_batches_hold_one_shape() -> None:
    shapes = ["wide"] * 5 + ["tall"] * 3 + ["square"]
    batches = Batches(shapes, batch_size=2, seed=0)
    assert batches.per_epoch == 3 + 2 + 1
    for epoch in range(3):
        steps = [batches.at(epoch * 6 + k) for k in range(6)]
        assert {index for batch in steps for index in batch} == set(range(9))
        assert all(len(batch) == 2 for batch in steps)
        assert all(len({shapes[index] for index in batch}) == 1 for batch in steps)
    assert [batches.at(k) for k in range(6)] != [batches.at(6 + k) for k in range(6)]


def test_sigma_follows_its_density_and_shift(use_vault: Path) -> None:
    """The median of each density is 1/2; shift 3 moves it to 3/4. The normal's sigmoid keeps to
    the middle: sigmoid(0.674), 0.662, is its upper quartile, and 0.75 the uniform one's."""
    family = load_family(BASES["z-image"])
    for sampling, quartile in (("uniform", 0.75), ("sigmoid", 0.662), ("logit_normal", 0.662)):
        for shift, median in ((1.0, 0.5), (3.0, 0.75)):
            levels = NoiseLevels(family, sampling, shift)
            draws = torch.tensor(
                [levels.draw((4, 8, 8), generator(0, "sigma", k)) for k in range(4000)]
            )
            assert 0 <= draws.min() and draws.max() < 1
            assert draws.median().item() == pytest.approx(median, abs=0.02)
            if shift == 1:
                assert draws.quantile(0.75).item() == pytest.approx(quartile, abs=0.02)


@pytest.mark.parametrize("name", ["z-image-turbo", "qwen-image"])
def test_shift_draws_the_noise_levels_of_the_bases_own_schedule(name: str, use_vault: Path) -> None:
    """Qwen-Image's depends on the size: e^mu is 1.71 at 512 pixels and 2.00 at 1024, and its
    last level is 0.02."""
    family = load_family(BASES[name])
    for edge in (512, 1024):
        rows = edge // family.vae_factor
        levels = NoiseLevels(family, "shift", 1.0)
        draws = [levels.draw((4, rows, rows), generator(0, "sigma", k)) for k in range(2000)]
        schedule = family.sigmas(1000, edge, edge).tolist()
        assert set(draws) <= set(schedule[:-1])
        assert len(set(draws)) > 800
        median = torch.tensor(draws).median().item()
        assert median == pytest.approx(schedule[500], abs=0.03)
        assert (min(draws) >= 0.0199) is (name == "qwen-image")


def test_the_rate_warms_up_and_falls_as_asked(small: Callable[..., Settings]) -> None:
    def shares(**given: Any) -> list[float]:
        settings = small(**({"steps": 20, "lr_warmup_steps": 4} | given))
        schedule, warmup, steps = settings.lr_scheduler, settings.warmup, settings.steps
        return [rate_at(step, schedule, warmup, steps) for step in range(20)]

    for schedule in ("cosine", "linear"):
        rates = shares(lr_scheduler=schedule)
        assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert 0 < rates[-1] < 0.1
    assert shares(lr_scheduler="linear")[12] == pytest.approx(0.5)
    assert shares(lr_scheduler="constant")[4:] == [1.0] * 16
    assert shares(lr_scheduler="constant", lr_warmup_steps=None)[:3] == [1 / 3, 2 / 3, 1.0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimiser_follows_the_schedule_in_both_groups(
    optimizer: str, small: Callable[..., Settings]
) -> None:
    settings = small(steps=10, lr_warmup_steps=1, lr_scheduler="linear", caption_dropout=0.0)
    settings = replace(settings, optimizer=optimizer)
    _, loop, _ = prepare(settings, True, True)
    start = [value.detach().clone() for value in loop.parameters]
    full = {
        "lora": settings.learning_rate,
        "placeholder": settings.placeholder_learning_rate,
    }
    for step, share in enumerate((0.5, 1.0)):
        loop.step(step)
        for name, each in loop.optimizers.items():
            assert each.param_groups[0]["lr"] == pytest.approx(full[name] * share)
    pairs = zip(start, loop.parameters, strict=True)
    *lora, row = (not torch.equal(before, after) for before, after in pairs)
    assert any(lora) and row


def test_prodigy_finds_the_rate_of_the_lora_and_the_placeholder_keeps_its_own(
    small: Callable[..., Settings],
) -> None:
    settings = small(optimizer="prodigy", steps=20, caption_dropout=0.0, rank=4)
    assert (settings.learning_rate, settings.warmup) == (1.0, 0)
    assert settings.placeholder_learning_rate == settings.base.placeholder_learning_rate
    _, loop, _ = prepare(settings, True, True)
    for step in range(12):
        loop.step(step)
    assert isinstance(loop.optimizers["placeholder"], torch.optim.AdamW)
    assert loop.rates["lora"] > 2e-6  # it begins at 1e-6
    assert loop.rates["placeholder"] == settings.placeholder_learning_rate


def test_accumulated_batches_give_the_gradient_of_their_mean(
    small: Callable[..., Settings],
) -> None:
    """One picture, so that two batches of one stack to a batch of two."""
    settings = small(steps=1, gradient_accumulation=2, max_grad_norm=1e6, caption_dropout=0.0)
    family, loop, _ = prepare(settings, True, True)
    parts = [loop.batch(number) for number in range(2)]
    latents, noise, sigma = (torch.cat([part[k] for part in parts]) for k in range(3))
    text = loop.captions.features([caption for part in parts for caption in part[3]])
    loss = flow_loss(family, latents, noise, sigma, text)
    wanted = torch.autograd.grad(loss, loop.parameters)

    found: list[torch.Tensor] = []
    for each in loop.optimizers.values():
        each.register_step_pre_hook(
            lambda optimizer, *_: found.extend(
                value.grad.clone() for value in optimizer.param_groups[0]["params"]
            )
        )
    loop.step(0)
    assert loop.history.losses[0].item() == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_the_shipped_weights_are_running_averages_where_they_are_asked_for(
    small: Callable[..., Settings],
) -> None:
    """The decay warms up, min(0.5, (1 + n) / (10 + n)), so that the start is soon forgotten."""
    _, loop, _ = prepare(small(steps=3, ema_decay=0.5, learning_rate=1e-2), True, True)
    seen = []
    for step in range(3):
        loop.step(step)
        seen.append([value.detach().clone() for value in loop.parameters])
    average = seen[0]
    for decay, present in ((2 / 11, seen[1]), (3 / 12, seen[2])):
        average = [
            decay * old + (1 - decay) * new for old, new in zip(average, present, strict=True)
        ]
    with loop.averaged():
        for wanted, value in zip(average, loop.parameters, strict=True):
            assert torch.allclose(wanted, value, rtol=1e-5, atol=1e-8)
        assert loop.placeholder is not None
        shipped = loop.placeholder.detached()
    for last, value in zip(seen[2], loop.parameters, strict=True):
        assert torch.equal(last, value)  # training goes on from where it was
    factors, placeholder = loop.shipped()
    assert placeholder is not None and torch.equal(placeholder.vectors, shipped.vectors)
    assert torch.allclose(next(iter(factors.values()))[0], average[0], rtol=1e-5, atol=1e-8)


def test_who_watches_is_called_after_every_step_before_its_checkpoint(
    small: Callable[..., Settings], tmp_path: Path
) -> None:
    _, loop, _ = prepare(small(steps=3, checkpoint_every=1), True, True)
    seen: list[tuple[int, int]] = []
    loop.run(None, tmp_path, [lambda loop: seen.append((loop.done, len(list(tmp_path.iterdir()))))])
    assert seen == [(1, 0), (2, 1), (3, 2)]


# Presets and the numbers of a base.


def test_steps_grow_with_the_pictures_between_two_bounds() -> None:
    base, plain = BASES["z-image-turbo"], find_preset(None)
    found = [steps_for(base, plain, pictures) for pictures in (1, 10, 20, 30, 500)]
    assert found == [1000, 1000, 2000, 3000, 3000]
    quick = [steps_for(base, PRESETS["quick_test"], pictures) for pictures in (10, 20)]
    assert quick == [200, 400]


def test_steps_that_are_given_stay(small: Callable[..., Settings]) -> None:
    assert small(steps=7).for_pictures(40).steps == 7
    assert small(steps=None).for_pictures(20).steps == 2000


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("base", BASES)
def test_every_preset_suits_every_base_and_yields_to_what_is_given(
    base: str, preset: str, small: Callable[..., Settings]
) -> None:
    row, values = BASES[base], PRESETS[preset]
    given = {"base_model": base, "preset": preset, "rank": None, "steps": None}
    settings = small(**given, resolution=None)
    assert settings.rank == row.rank * values.rank
    assert settings.learning_rate == row.learning_rate * values.learning_rate
    assert settings.resolutions[0] <= row.training_resolution
    assert small(**{**given, "rank": 3}, learning_rate=1e-5).rank == 3


def test_the_shift_of_the_base_belongs_to_its_own_sampling(small: Callable[..., Settings]) -> None:
    shift = BASES["z-image"].training_shift
    assert small().training_shift == shift != 1
    assert small(timestep_sampling="uniform").training_shift == 1
    assert small(timestep_sampling="uniform", training_shift=2.5).training_shift == 2.5


# What a LoRA adapts.


def test_lora_targets_are_named_by_group_by_name_or_by_pattern(use_vault: Path) -> None:
    family = load_family(BASES["z-image"])
    attention, feed_forward = family.lora_targets("attention"), family.lora_targets("feed_forward")
    assert set(family.lora_targets()) == {*attention, *feed_forward}
    assert {name.split(".")[2] for name in attention} == {"attention"}
    ends = {name.rpartition(".")[2] for name in family.lora_targets("to_q, feed_forward.w2")}
    assert ends == {"to_q", "w2"}
    assert family.lora_targets("layers.1.*.to_?") == [
        f"layers.1.attention.to_{each}" for each in "qkv"
    ]
    everything = family.lora_targets("all")
    assert set(everything) > set(family.lora_targets())
    assert any("adaLN" in name for name in everything)


def test_every_layer_of_all_can_learn(use_vault: Path) -> None:
    for name in ("z-image", "qwen-image"):
        family = load_family(BASES[name])
        layers = dict(family.transformer.named_modules())
        targets = family.lora_targets("all")
        for target in targets:
            layers[target].weight.requires_grad_(True)
        with torch.no_grad():
            text = family.encode_prompts(["a cat"])
        shape = (1, family.latent_channels, 8, 8)
        family.velocity(torch.randn(shape), torch.tensor([0.5]), text).square().sum().backward()
        assert [each for each in targets if layers[each].weight.grad is None] == []


def test_lora_targets_that_fit_no_layer_are_refused_before_the_pictures_are_encoded(
    small: Callable[..., Settings],
) -> None:
    with pytest.raises(ValueError, match="'atention.to_q' fits no.*did you mean 'attention.to_q'"):
        train(small(lora_targets="atention.to_q"))


# What is refused, and when.


def test_everything_wrong_is_said_before_a_model_is_loaded(
    small: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.zip"
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("good.png", buffer.getvalue())
        archive.writestr("half.png", buffer.getvalue()[:60])
        archive.writestr("empty.jpg", b"")
    settings = small(dataset=broken)

    def no_model(*_: Any) -> None:
        raise AssertionError("a model was asked for")

    monkeypatch.setattr("trainer.run.load_family", no_model)
    with pytest.raises(DatasetError) as caught:
        train(settings)
    assert "half.png" in str(caught.value) and "empty.jpg" in str(caught.value)


def test_a_word_the_tokenizer_knows_is_refused_before_the_pictures_are_encoded(
    small: Callable[..., Settings],
) -> None:
    settings = small(placeholder_token="cat")
    with pytest.raises(PlaceholderError, match="already knows"):
        train(settings)
    assert settings.output_dir is not None
    assert not list(settings.output_dir.glob("**/*.zip"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dataset": None}, "dataset is missing"),
        ({"rank": 0}, "rank is 0; it lies between 1 and 256"),
        ({"steps": -1, "caption_dropout": 2.0}, "steps is -1.*; caption_dropout is 2"),
        ({"resolution": "64,big"}, "resolution"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler 'cosin' is not one of.*did you mean 'cosine'"),
        ({"preset": "charcter"}, "preset 'charcter' is not one of.*did you mean 'character'"),
        ({"optimizer": "adam"}, "optimizer 'adam' is not one of.*did you mean 'adamw'"),
        ({"optimizer": "adamw8bit"}, "adamw8bit is for a GPU.*use adamw"),
        (
            {"optimizer": "prodigy", "learning_rate": 1e-4},
            "learning_rate is 0.0001, but prodigy finds the rate by itself.*leave it out",
        ),
        ({"timestep_sampling": "sigmoidal"}, "did you mean 'sigmoid'"),
        ({"timestep_sampling": "shift", "training_shift": 3.0}, "leave training_shift out"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0; it lies between 1 and"),
        ({"ema_decay": 1.0}, "ema_decay is 1; it lies between 0 and"),
        ({"quantize": "int4"}, "quantize 'int4' is not one of auto, none, fp8, int8, nf4"),
        ({"trackers": "wandb,tensorbord"}, "trackers 'tensorbord'.*did you mean 'tensorboard'"),
        ({"steps": 0}, "steps is 0; leave it out"),
        ({"placeholder_token": "a b"}, "white space"),
        ({"base_model": "z-image-trubo"}, "did you mean 'z-image-turbo'"),
    ],
)
def test_a_setting_out_of_range_is_named(
    given: dict[str, Any], said: str, small: Callable[..., Settings]
) -> None:
    with pytest.raises(ValueError, match=said):
        small(**given)
    assert issubclass(SettingsError, ValueError)


def test_a_loss_that_is_not_finite_stops_the_training(small: Callable[..., Settings]) -> None:
    _, loop, _ = prepare(small(steps=5), True, False)
    loop.samples[0].mean_CHW.fill_(float("nan"))
    with pytest.raises(Diverged, match="lower learning_rate"):
        loop.run()
