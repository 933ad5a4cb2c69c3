"""The loop learns what it should, and can be repeated."""

import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import make_loop

from adapters.archive import read_archive
from families.loading import load_family
from families.registry import BASES
from trainer.learning.loop import Diverged, Loop
from trainer.learning.loss import flow_loss
from trainer.learning.optimizers import rate_at
from trainer.learning.randomness import generator
from trainer.learning.saving import Saver
from trainer.learning.timesteps import NoiseLevels
from trainer.run import train
from trainer.settings.choices import OPTIMIZERS
from trainer.settings.fields import Settings


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
    loop = make_loop(settings, 1, what == "lora", what == "placeholder")
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
        loop = make_loop(settings, 1, with_placeholder=with_placeholder)
        seen: list[float] = []

        def note(*_: Any, loop: Loop = loop, seen: list[float] = seen) -> None:
            grads = [p.grad for p in loop.lora_parameters if p.grad is not None]
            seen.append(torch.nn.utils.get_total_norm(grads).item())

        loop.optimizers["lora"].register_step_pre_hook(note)
        loop.step(0)
        norms += seen
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


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
    small: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    """And so is, before the first step, how many images use the default caption."""
    caplog.set_level(logging.INFO)
    settings = [small(seed=None, batch_size=4, steps=1) for _ in range(2)]
    assert settings[0].seed != settings[1].seed
    path = train(settings[0])
    with zipfile.ZipFile(path) as archive:
        meta = json.loads(archive.read("meta.json"))
    assert meta["settings"]["seed"] == settings[0].seed
    assert str(path.parent) not in json.dumps(meta)  # where things lay is nobody's business

    assert meta["dataset"]["captions"] == {"own": 4, "default": 2}
    assert "4 own, 2 default" in path.with_name("report.html").read_text()
    before = caplog.text.partition("zero prior:")[0]
    own = "photos.zip: 6 images: 4 with a caption file, 2 use 'a photo of TOK': "
    assert f"{own}clock_motion.png, rocket.jpg" in before
    assert "some sizes have fewer images than batch_size 4" in before


def test_a_batch_depends_on_its_step_alone(small: Callable[..., Settings]) -> None:
    settings = small(batch_size=2, steps=10)
    loop = make_loop(settings, 1, with_lora=False)
    late = loop.batch(7)
    for step in range(7):
        loop.batch(step)
    for ours, theirs in zip(loop.batch(7), late, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


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
    settings = settings.replace(optimizer=optimizer)
    loop = make_loop(settings, 1)
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
    loop = make_loop(settings, 1)
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
    loop = make_loop(settings, 1)
    parts = [loop.batch(number) for number in range(2)]
    latents, noise, sigma = (torch.cat([part[k] for part in parts]) for k in range(3))
    text = loop.captions.features([caption for part in parts for caption in part[3]])
    loss = flow_loss(loop.family, latents, noise, sigma, text)
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
    loop = make_loop(small(steps=3, ema_decay=0.5, learning_rate=1e-2), 1)
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
        final_weights = loop.placeholders[0].detached()
    for last, value in zip(seen[2], loop.parameters, strict=True):
        assert torch.equal(last, value)  # training goes on from where it was
    factors, (placeholder,) = loop.final_weights()
    assert torch.equal(placeholder.vectors, final_weights.vectors)
    assert torch.allclose(next(iter(factors.values()))[0], average[0], rtol=1e-5, atol=1e-8)


def test_who_watches_is_called_after_every_step_before_its_checkpoint(
    small: Callable[..., Settings], tmp_path: Path
) -> None:
    loop = make_loop(small(steps=3, checkpoint_every=1), 1)
    seen: list[tuple[int, int]] = []
    folder = tmp_path / "checkpoints"

    def see(loop: Loop) -> None:
        seen.append((loop.done, len(list(folder.glob("*.safetensors")))))

    loop.run(None, Saver(folder), [see])
    assert seen == [(1, 0), (2, 1), (3, 2)]


def test_a_loss_that_is_not_finite_stops_the_training(small: Callable[..., Settings]) -> None:
    loop = make_loop(small(steps=5), 1, with_placeholder=False)
    loop.samples[0].mean_CHW.fill_(float("nan"))
    with pytest.raises(Diverged, match="lower learning_rate"):
        loop.run()
