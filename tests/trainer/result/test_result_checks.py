"""Each check can fail; good weights pass, and weights of no use never become weights.zip."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from adapters.archive import Archive, read_archive, write_archive
from adapters.formats.deltas import LowRank
from adapters.formats.factors import Factors
from adapters.placeholder import Placeholder
from trainer.learning.loop import Loop
from trainer.monitor.validation import Curves
from trainer.result import result_checks
from trainer.result.evaluation import without_subject
from trainer.result.result_checks import (
    DOUBTFUL,
    FAILED,
    INFORMATION,
    PASSED,
    SKIPPED,
    Kernels,
    Worthless,
)
from trainer.run import train
from trainer.settings.fields import Settings


@pytest.fixture
def factors() -> Factors:
    random = torch.Generator().manual_seed(1)
    return {
        name: (torch.randn(2, 6, generator=random), torch.randn(4, 2, generator=random))
        for name in ("one", "two", "three")
    }


@pytest.fixture
def archive(factors: Factors) -> Archive:
    word = Placeholder("<zwx>", torch.randn(1, 8, generator=torch.Generator().manual_seed(2)))
    return Archive(factors, (word,), {"base_model": "here/base"})


# What was learned.


def test_every_layer_must_change_its_weight(factors: Factors) -> None:
    check = result_checks.learned(factors)
    assert (check.state, check.value, check.worthless) == (PASSED, 1, False)

    factors["two"] = (factors["two"][0], torch.zeros(4, 2))
    check = result_checks.learned(factors)
    assert (check.state, check.worthless) == (FAILED, False)
    assert "1 of 3 LoRA layers (two) have no effect" in check.sentence

    nothing = {name: (down, torch.zeros_like(up)) for name, (down, up) in factors.items()}
    assert result_checks.learned(nothing).worthless


def test_an_update_that_rounding_takes_away_counts_as_none(factors: Factors) -> None:
    tiny = {name: (down, up * 1e-42) for name, (down, up) in factors.items()}
    assert all(up.abs().sum() > 0 for _, up in tiny.values())  # as trained, in float32
    assert result_checks.learned(tiny).worthless  # as written, in bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_make_weights_worthless(factors: Factors, value: float) -> None:
    factors["two"][1][3, 1] = value
    check = result_checks.learned(factors)
    assert (check.state, check.worthless) == (FAILED, True)
    assert "1 of 3 LoRA layers (two) contain NaN or infinity" in check.sentence


def test_the_norm_of_an_update_is_that_of_the_product(factors: Factors) -> None:
    for down, up in factors.values():
        assert LowRank(down, up).norm() == pytest.approx((up @ down).norm().item())


# What is in the file.


def test_an_archive_that_reads_back_is_told_from_one_that_does_not(
    archive: Archive, tmp_path: Path
) -> None:
    path = write_archive(archive, tmp_path / "weights.zip")
    assert result_checks.reloads(archive, path).state == PASSED

    down, up = archive.factors["two"]
    other = dict(archive.factors) | {"two": (down, up + up.abs().max() / 64)}
    check = result_checks.reloads(Archive(other, archive.placeholders, {}), path)
    assert check.worthless
    assert "1 of 3 LoRA layers (two) differ" in check.sentence

    fewer = {name: pair for name, pair in archive.factors.items() if name != "one"}
    assert "(one) are not in both" in result_checks.reloads(Archive(fewer, (), {}), path).sentence
    assert (
        "placeholder differs"
        in result_checks.reloads(replace(archive, placeholders=()), path).sentence
    )

    path.write_bytes(path.read_bytes()[:-100])
    check = result_checks.reloads(archive, path)
    assert check.worthless
    assert "the file is invalid" in check.sentence


# What is drawn.


PLAIN = Kernels("cpu", torch.float32)


def test_a_preview_from_the_same_kernels_must_equal_the_prediction() -> None:
    one = Image.new("RGB", (8, 8), (100, 100, 100))
    other = one.copy()
    other.putpixel((3, 3), (100, 101, 100))
    assert result_checks.previews_match(one, one.copy(), PLAIN, PLAIN).state == PASSED
    check = result_checks.previews_match(one, other, PLAIN, PLAIN)
    assert (check.state, check.value) == (FAILED, 1)
    assert result_checks.previews_match(one, one.resize((9, 8)), PLAIN, PLAIN).state == FAILED


@pytest.mark.parametrize(
    "made_by",
    [
        replace(PLAIN, compiled=True),
        replace(PLAIN, dtype=torch.bfloat16),
        replace(PLAIN, device="cuda"),
    ],
    ids=str,
)
def test_a_preview_from_other_kernels_may_differ_by_their_rounding(made_by: Kernels) -> None:
    one = Image.new("RGB", (8, 8), (100, 100, 100))
    near, far = (Image.new("RGB", (8, 8), (level, 100, 100)) for level in (102, 108))
    check = result_checks.previews_match(one, near, made_by, PLAIN)
    assert check.state == PASSED
    assert "differ by 0.667 levels of 255 on average; the limit is 2," in check.sentence
    assert f"({made_by}; cpu, float32)" in check.sentence
    assert result_checks.previews_match(one, far, made_by, PLAIN).state == FAILED
    assert result_checks.previews_match(one, one.resize((9, 8)), made_by, PLAIN).state == FAILED


def test_two_images_of_a_gpu_may_differ_too() -> None:
    one, near = (Image.new("RGB", (8, 8), (level, 100, 100)) for level in (100, 101))
    kernels = replace(PLAIN, device="cuda")
    assert result_checks.previews_match(one, near, kernels, kernels).state == PASSED


@pytest.mark.slow
def test_the_preview_of_a_compiled_training_passes(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where it was asked to equal the image of plain blocks."""
    monkeypatch.setenv("COMPILE", "1")
    monkeypatch.setenv("DTYPE", "bfloat16")
    options = {"width": 64, "height": 64, "num_inference_steps": 4}
    settings = small(sample_prompts=("<zwx>",), sample_options=options, validation_every=0)
    found = read_archive(train(settings)).meta["checks"]
    (check,) = (check for check in found if check["name"] == result_checks.PREVIEW)
    assert check["state"] == PASSED


def test_the_drift_of_an_image_is_for_information() -> None:
    base, moved = Image.new("RGB", (8, 8), (100,) * 3), Image.new("RGB", (8, 8), (125,) * 3)
    check = result_checks.drift_of_images(base, moved, "a landscape")
    assert (check.state, check.value) == (INFORMATION, pytest.approx(20.17, abs=0.01))
    assert result_checks.drift_of_images(base, base.copy(), "a landscape").value is None


@pytest.mark.parametrize(
    ("prompt", "neutral"),
    [
        ("a photo of <zwx>", "a photo of something"),
        ("a <zwx> beside a dog", "something beside a dog"),
        ("a cat", "a landscape"),
        ("a photo of <zwx>, <zwx>s", "a photo of something, somethings"),
    ],
)
def test_the_prompt_without_the_subject_is_about_something_else(prompt: str, neutral: str) -> None:
    assert without_subject(prompt, "<zwx>") == neutral
    assert without_subject(prompt) == "a landscape"


def test_the_subject_within_a_longer_word_is_another_word() -> None:
    assert without_subject("a fox and a foxglove", "fox") == "something and a foxglove"
    assert without_subject("a foxglove", "fox") == "a landscape"


# What has a limit.


@pytest.mark.parametrize(
    ("share", "state"),
    [(0.36, PASSED), (0.75, DOUBTFUL), (0.87, FAILED), (1.3, FAILED), (float("nan"), FAILED)],
)
def test_a_velocity_that_moves_too_far_without_the_subject_fails(share: float, state: str) -> None:
    check = result_checks.drift_of_velocity(share, 8)
    assert check.state == state
    assert "for 8 prompts without the subject" in check.sentence
    assert ("the limit is" in check.sentence) == (state != PASSED)


@pytest.mark.parametrize(
    ("scale", "state"), [(0.1, PASSED), (0.7, DOUBTFUL), (1.1, FAILED), (float("inf"), FAILED)]
)
def test_an_update_as_large_as_the_weights_fails(
    factors: Factors, scale: float, state: str
) -> None:
    norms = {name: LowRank(*pair).norm() for name, pair in factors.items()}
    check = result_checks.update_size({name: (scale * n, n) for name, n in norms.items()})
    assert check.state == state
    if state != PASSED:
        assert "lower learning_rate" in check.sentence and "the limit is" in check.sentence
    if scale < 10:
        assert check.value == pytest.approx(scale)


def test_one_layer_that_exploded_fails_among_good_ones(factors: Factors) -> None:
    norms = {name: LowRank(*pair).norm() for name, pair in factors.items()}
    small = {name: (0.1 * norm, norm) for name, norm in norms.items()}
    small["two"] = 3 * norms["two"], norms["two"]
    assert result_checks.update_size(small).state == FAILED


@pytest.mark.parametrize(
    ("facts", "state", "worthless", "said"),
    [
        ({}, PASSED, False, "9 steps used it"),
        ({"moved": False}, FAILED, True, "exactly as before training"),
        ({"moved": False, "steps_with_placeholder": 0}, FAILED, True, "no step used <zwx>"),
        # Continued from weights that hold a trained token.
        ({"steps_with_placeholder": 0}, FAILED, False, "no step used <zwx>"),
    ],
)
def test_a_token_that_never_moved_fails(
    facts: dict[str, float], state: str, worthless: bool, said: str
) -> None:
    start = {"norm_start": 0.1, "norm_end": 0.8, "moved": True, "steps_with_placeholder": 9}
    check = result_checks.token_moved("<zwx>", start | facts)
    assert (check.state, check.worthless) == (state, worthless)
    assert said in check.sentence


@pytest.mark.parametrize("held_out", [[], ["1.png", "2.png"]], ids=["fit", "validation"])
def test_a_loss_that_rises_beyond_noise_fails(held_out: list[str]) -> None:
    curves = Curves([0.2, 0.8], held_out, [0, 5, 10], [[1.0, 1.0], [0.5, 0.5], [0.9, 0.9]])
    check = result_checks.loss_fell(curves)
    assert (check.state, check.value) == (PASSED, 0.9)
    assert "the lowest was 0.5000 at step 5" in check.sentence
    assert (
        check.name == f"the {'validation loss' if held_out else 'loss on the training images'} fell"
    )
    assert ("on 2 held-out images" in check.sentence) == bool(held_out)
    limit = 1.5 if held_out else 1.05  # of an overfitted LoRA that may be good; of noise
    nan = float("nan")
    for last, state in ((1, DOUBTFUL), (limit, DOUBTFUL), (limit + 0.01, FAILED), (nan, FAILED)):
        risen = replace(curves, losses=[*curves.losses[:2], [last, last]])
        assert result_checks.loss_fell(risen).state == state
    assert result_checks.loss_fell(Curves([0.2], held_out, [], [])).state == SKIPPED


# In a training.


def test_worthless_weights_are_kept_under_another_name(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(steps=1, train_placeholder_token=False, trigger_word="r3dfox")
    folder = settings.output_dir
    assert folder is not None
    monkeypatch.setattr(Loop, "step", lambda self, step: _nothing(self, step))
    with pytest.raises(Worthless, match="none of .* LoRA layers has an effect"):
        train(settings)

    assert not (folder / "weights.zip").exists()
    with zipfile.ZipFile(folder / "weights-failed.zip") as kept:
        assert json.loads(kept.read("meta.json"))["base_model"] == settings.base.hub_id
    assert "has an effect" in (folder / "report-failed.html").read_text()
    assert not (folder / "weights-unchecked.zip").exists()
    assert not (folder / "report.html").exists()


def _nothing(loop: Loop, step: int) -> None:
    """A step that learns nothing."""
    loop.history.losses.append(torch.tensor(1.0))
    loop.done = step + 1
