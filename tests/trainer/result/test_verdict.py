"""A run's result is good, doubtful or broken, and log, meta.json, report and exit code say so."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.archive import read_archive
from adapters.formats.deltas import LowRank
from demo.subject import SCENES, photographs
from trainer.__main__ import CHECKS_FAILED
from trainer.__main__ import run as run_command
from trainer.result import evaluation, result_checks
from trainer.result.headline import CHANGED, LEARNED, headlines
from trainer.result.result_checks import (
    DOUBTFUL,
    FAILED,
    INFORMATION,
    PASSED,
    SKIPPED,
    CheckResult,
    Worthless,
)
from trainer.result.verdict import BROKEN, GOOD, verdict
from trainer.run import train
from trainer.settings.fields import Settings, SettingsError, resolve
from trainer.settings.inputs import TrainingInputs

PREVIEW: dict[str, Any] = {
    "sample_prompts": ("<zwx>",),
    "sample_options": {"width": 64, "height": 64, "num_inference_steps": 2},
}


def checks(weights: Path) -> dict[str, str]:
    """The states of all checks, by name."""
    return {check["name"]: check["state"] for check in read_archive(weights).meta["checks"]}


def last_line(caplog: pytest.LogCaptureFixture) -> str:
    return [each for each in caplog.messages if each.startswith(("check ", "result "))][-1]


# ---- The three classes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "result", "counts"),
    [
        ([PASSED, INFORMATION], GOOD, "1 checks passed, 0 failed, 0 skipped"),
        ([PASSED, SKIPPED], DOUBTFUL, "1 checks passed, 0 failed, 1 skipped"),
        ([PASSED, DOUBTFUL], DOUBTFUL, "1 checks passed, 1 doubtful, 0 failed, 0 skipped"),
        ([PASSED, SKIPPED, FAILED], BROKEN, "1 checks passed, 1 failed, 1 skipped"),
        ([], DOUBTFUL, "0 checks passed, 0 failed, 0 skipped"),
    ],
)
def test_the_worst_check_decides(states: list[str], result: str, counts: str) -> None:
    found = [CheckResult("a check", state, "") for state in states]
    assert str(verdict(found, validated=True)) == f"{result}: {counts}"
    fit = str(verdict(found, validated=False))
    assert fit == f"{result}: {counts}; not validated: no image was held out"


def test_a_good_run(small: Callable[..., Settings], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    weights = train(small(learning_rate=1e-3, validation_every=None, **PREVIEW))
    assert checks(weights) == {
        "every layer was trained": PASSED,
        "the file can be read back": PASSED,
        "<zwx> was trained": PASSED,
        "the loss on the training images fell": PASSED,
        result_checks.UPDATE: PASSED,
        result_checks.DRIFT: PASSED,
        result_checks.PREVIEW: PASSED,
        "drift of an image without the subject": INFORMATION,
    }
    numbers = r"subject learned \d+ %, other prompts changed \d+ %"
    counts = "7 checks passed, 0 failed, 0 skipped; not validated: no image was held out"
    assert re.fullmatch(f"result good: {numbers}; {counts}", last_line(caplog))
    assert read_archive(weights).meta["result"] == GOOD
    page = (weights.parent / "report.html").read_text()
    assert last_line(caplog).removeprefix("result ") in page
    assert "Share of the base model" in page and page.index("subject learned") < page.index("Steps")
    record = json.loads((weights.parent / "record.json").read_text())
    for facts in (read_archive(weights).meta, record):
        shown = {each["name"]: (each["unit"], each["state"]) for each in facts["headlines"]}
        assert shown == {LEARNED: ("%", PASSED), CHANGED: ("%", PASSED)}
    assert "no image is held out (validation_images: auto holds out one in 10" in caplog.text


def test_a_run_without_images_and_without_a_loss_is_doubtful(
    small: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    weights = train(small(learning_rate=1e-3, validation_every=0))
    found = checks(weights)
    assert found["the loss on the training images fell"] == found[result_checks.PREVIEW] == SKIPPED
    numbers = r"subject learned not measured, other prompts changed \d+ %"
    counts = "5 checks passed, 0 failed, 2 skipped; not validated"
    assert re.match(f"result doubtful: {numbers}; {counts}", last_line(caplog))
    assert read_archive(weights).meta["result"] == DOUBTFUL
    assert counts in (weights.parent / "report.html").read_text()


def test_a_broken_run_writes_its_weights_and_exits_with_3(
    small: Callable[..., Settings], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    settings = small(learning_rate=1, steps=2, validation_every=0)
    with pytest.raises(SystemExit) as left:
        run_command(settings)
    assert left.value.code == CHECKS_FAILED == 3
    assert settings.output_dir is not None
    weights = settings.output_dir / "weights.zip"
    assert checks(weights)[result_checks.UPDATE] == FAILED
    assert read_archive(weights).meta["result"] == BROKEN
    assert last_line(caplog).startswith("result broken: ")
    assert "broken: " in (weights.parent / "report.html").read_text()
    warned = "learning_rate is 1, 10,000 times the default of z-image (0.0001)"
    assert warned in caplog.text
    assert caplog.text.index(warned) < caplog.text.index("LoRA of rank")  # before the first step


def test_learning_rate_1_is_red_at_the_top_of_the_report(tmp_path: Path) -> None:
    settings = resolve(
        TrainingInputs(
            dataset=SCENES,
            base_model="miniature-turbo",
            steps=4,
            batch_size=2,
            learning_rate=1,
            validation_every=4,
            sample_prompts="",
            seed=1,
            output_dir=tmp_path / "out",
        )
    )
    weights = train(settings)
    meta = read_archive(weights).meta
    assert meta["result"] == BROKEN
    states = {each["name"]: each["state"] for each in meta["headlines"]}
    assert states == {LEARNED: FAILED, CHANGED: FAILED}
    page = (weights.parent / "report.html").read_text()
    assert page.count('<span class="chip small failed">failed</span><strong>') == 2


def test_the_two_numbers_are_percentages_of_their_checks() -> None:
    found = [
        CheckResult(result_checks.DRIFT, PASSED, "", 0.195),
        CheckResult(result_checks.LOSS_FELL, DOUBTFUL, "", 1.1),  # of held-out images: not shown
        CheckResult(result_checks.FIT_FELL, PASSED, "", 0.39),
    ]
    assert list(map(str, headlines(found))) == [f"{LEARNED} 61 %", f"{CHANGED} 20 %"]
    worse = CheckResult(result_checks.FIT_FELL, FAILED, "", 1.66)
    assert str(headlines([worse])[0]) == f"{LEARNED} -66 %"
    for state, shown in ((SKIPPED, "not measured"), (FAILED, "not finite")):
        assert headlines([CheckResult(result_checks.DRIFT, state, "")])[0].shown == shown


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, PREVIEW], ids=["no previews", "previews"])
@pytest.mark.parametrize("every", [0, None], ids=["not measured", "measured"])
@pytest.mark.parametrize("dataset", ["photographs", "scenes"])
@pytest.mark.parametrize(("rate", "steps"), [(1, 1), (1, 6), (0.08, 10)])
def test_a_run_at_a_far_too_high_rate_is_broken(
    rate: float,
    steps: int,
    dataset: str,
    every: int | None,
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    images = SCENES if dataset == "scenes" else photographs(tmp_path).dataset
    result = resolve(
        TrainingInputs(
            dataset=images,
            base_model="miniature-turbo",
            steps=steps,
            learning_rate=rate,
            validation_every=every,
            seed=1,
            output_dir=tmp_path / "out",
            **options,
        )
    )
    assert read_archive(train(result)).meta["result"] == BROKEN


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["photographs", "scenes"])
def test_a_run_at_the_default_rate_is_good(dataset: str, tmp_path: Path) -> None:
    images = SCENES if dataset == "scenes" else photographs(tmp_path).dataset
    settings = resolve(
        TrainingInputs(
            dataset=images,
            base_model="miniature-turbo",
            steps=60,
            seed=1,
            output_dir=tmp_path / "out",
            **PREVIEW,
        )
    )
    assert read_archive(train(settings)).meta["result"] == GOOD


# ---- Weights of no use ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"placeholder_learning_rate": 0}, "its embedding is exactly as before training"),
        ({"caption_dropout": 1}, "no step used <zwx>"),
        ({"learning_rate": 0}, "none of [0-9]+ LoRA layers has an effect"),
    ],
    ids=str,
)
def test_what_was_not_trained_is_never_weights_zip(
    changes: dict[str, Any], said: str, small: Callable[..., Settings]
) -> None:
    settings = small(**{"steps": 1, "validation_every": 0, "learning_rate": 1e-3} | changes)
    with pytest.raises(Worthless, match=said):
        train(settings)
    assert settings.output_dir is not None
    assert not (settings.output_dir / "weights.zip").exists()
    assert (settings.output_dir / "weights-failed.zip").is_file()


def test_a_check_that_cannot_be_made_is_skipped(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(evaluation, "velocity_drift", fail)
    weights = train(small(learning_rate=1e-3, steps=1))
    assert checks(weights)[result_checks.DRIFT] == SKIPPED
    assert read_archive(weights).meta["result"] == DOUBTFUL


def test_a_random_lora_fails_the_size_of_its_update() -> None:
    random = torch.Generator().manual_seed(1)
    pair = torch.randn(8, 64, generator=random), torch.randn(64, 8, generator=random)
    base = 64 * 64**-0.5  # of a weight with the usual start, 1 / sqrt(in)
    assert result_checks.update_size({"one": (LowRank(*pair).norm(), base)}).state == FAILED


# ---- Rates and held-out images -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"learning_rate": 2e-3}, []),
        ({"learning_rate": 2.1e-3}, ["learning_rate"]),
        ({"placeholder_learning_rate": 0.5}, ["placeholder_learning_rate"]),
        ({"placeholder_learning_rate": 0.5, "train_placeholder_token": False}, []),
        ({"optimizer": "prodigy"}, []),  # its rate of 1 is a factor
        ({"preset": "quick_test"}, []),
    ],
    ids=str,
)
def test_a_rate_more_than_20_times_the_default_is_a_warning(
    changes: dict[str, Any], named: list[str]
) -> None:
    from trainer.settings.checks import high_rates

    settings = resolve(TrainingInputs(dataset="imgs.zip", base_model="z-image", seed=1, **changes))
    assert [each.split()[0] for each in high_rates(settings)] == named


@pytest.mark.parametrize("wanted", ["many", "-1", "1.5", -1, 10**12])
def test_validation_images_must_be_auto_or_a_number(wanted: str | int) -> None:
    with pytest.raises(SettingsError, match="validation_images"):
        resolve(
            TrainingInputs(dataset="imgs.zip", base_model="miniature", validation_images=wanted)
        )


def test_held_out_images_that_are_never_measured_are_refused() -> None:
    with pytest.raises(SettingsError, match="validation_images is 2, but validation_every is 0"):
        resolve(
            TrainingInputs(
                dataset="a.zip", base_model="miniature", validation_images=2, validation_every=0
            )
        )


def test_more_held_out_images_than_half_are_refused_before_a_model_is_loaded(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.reading.load_family", lambda *_: pytest.fail("a model was loaded"))
    said = (
        "validation_images is 4, but the dataset has 6 images, of which at most 3 can be held out"
    )
    with pytest.raises(SettingsError, match=said):
        train(small(validation_images="4", validation_every=None))
