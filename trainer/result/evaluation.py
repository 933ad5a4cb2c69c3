"""Writes weights.zip and checks it, with the checks of `trainer.result.result_checks` in order.

weights-unchecked.zip   while the checks that can reject it run; they take seconds
weights.zip             after they passed; rewritten later with all results in its meta.json
weights-failed.zip      if the weights are unusable, or on another error before weights.zip is
                        written; an earlier weights.zip is kept

After weights.zip is written, every error is a warning: a check is skipped, or a file is not written
or not uploaded.
"""

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from adapters.archive import Archive, write_archive
from adapters.files import atomic
from adapters.merging import LoraMerger
from adapters.trained_model import read_weights, write_meta, write_trained_model
from families.family import Family, WeightStorage
from families.loading import load_family
from families.out_of_memory import free_frames, is_out_of_memory
from families.registry import with_transformer
from families.tokens import mentions, whole_word
from inference.generation import generate
from trainer.data import Example
from trainer.events import Events
from trainer.learning import Diverged, Loop, Saver, describe_weights, size_of
from trainer.memory import free_memory
from trainer.monitor import (
    Curves,
    PreviewImages,
    check_originals_fit,
    measure_fit,
    pair_of,
    preview_requests,
    sample_scale,
)
from trainer.result import full_checks, report, result_checks
from trainer.result.drift import drift_prompts, velocity_drift
from trainer.result.record import TrainingRecord
from trainer.result.report import ReportData
from trainer.result.result_checks import SKIPPED, CheckResult, Kernels, Worthless
from trainer.result.verdict import Verdict, log_verdict
from trainer.settings import Settings

log = logging.getLogger(__name__)

WITHOUT_SUBJECT = "a landscape"


@dataclass(frozen=True)
class Outcome:
    """The data of a run that the evaluation needs after the model is unloaded."""

    settings: Settings
    archive: Archive
    path: Path  # of weights.zip
    record: TrainingRecord
    examples: Sequence[Example]
    preview_images: PreviewImages
    events: Events
    kernels: Kernels  # of the training, which made the previews
    needs_offload: bool  # the base was quantized or offloaded during training
    family: Family | None = None  # the unchanged base, if the run can restore it in memory


def write_weights(
    loop: Loop,
    record: TrainingRecord,
    examples: Sequence[Example],
    preview_images: PreviewImages,
    path: Path,
    saver: Saver,
) -> Outcome:
    """Writes the loop's weights to `path`, if they are usable, and runs the first checks.

    Raises `Worthless` if they are not, and saves them as `…-failed.zip`, with a report.
    """
    archive, full = Archive(*loop.final_weights(), record.meta()), loop.full
    if full is None:
        unchecked = saver.with_reserve(lambda: write_archive(archive, _unchecked(path)))
        found = [result_checks.learned(archive.deltas), result_checks.reloads(archive, unchecked)]
    else:
        archive = replace(archive, model=path)
        written = full.transformer, archive.placeholders, archive.meta, _unchecked(path)
        unchecked = saver.with_reserve(lambda: write_trained_model(*written))
        changes = full.changes()
        found = [full_checks.learned_in_full(full, changes)]
        found.append(full_checks.reloads_in_full(full, archive, unchecked, loop.family))
    for token, facts in zip(archive.tokens, record.zero_priors, strict=True):
        found.append(result_checks.token_moved(token, facts))
    found.append(result_checks.loss_fell(record.curves))
    if any(check.worthless for check in found):
        failed = path.with_stem(f"{path.stem}-failed")
        atomic.replace(unchecked, failed)
        page = path.with_name(report.NAME.replace(".", "-failed."))
        with _warn_on_error(f"{page} is not written"):
            checked = replace(record, checks=found)
            report.write_report(_report_data(checked, examples, preview_images), page)
        reasons = "; ".join(f"{check.name}: {check.sentence}" for check in found if check.worthless)
        raise Worthless(f"{reasons}. The weights are saved as {failed}, the report as {page}")
    atomic.replace(unchecked, path)
    log.info("wrote %s (%.1f MB)", path, size_of(path) / 1e6)
    if full is not None:
        found += _check(result_checks.UPDATE, lambda: result_checks.update_size(changes))
    return Outcome(
        loop.settings,
        archive,
        path,
        replace(record, checks=found),
        examples,
        preview_images,
        loop.events,
        Kernels.of(loop.family),
        needs_offload=loop.family.storage != WeightStorage(),
    )


def check_model(loop: Loop, curves: Curves, examples: Sequence[Example]) -> list[CheckResult]:
    """The checks that run the trained model: with a sharded base, all processes call this.

    Raises an out-of-memory error then, since the others would wait for this process.
    """
    shared, lora = loop.family.storage.shard, loop.lora
    prompts = drift_prompts(loop.settings)

    def fit() -> CheckResult:
        return result_checks.loss_fell(measure_fit(loop))

    def update() -> CheckResult:
        assert lora is not None
        with loop.averaged():
            return result_checks.update_size(lora.changes())

    def drift() -> CheckResult:
        return result_checks.drift_of_velocity(velocity_drift(loop, prompts), len(prompts))

    checks = {
        **({result_checks.FIT_FELL: fit} if curves.held_out else {}),  # else it is checked before
        **({result_checks.UPDATE: update} if lora is not None else {}),  # the same
        result_checks.DRIFT: drift,
    }
    return [each for name, call in checks.items() for each in _check(name, call, shared)]


def _report_data(
    record: TrainingRecord, examples: Sequence[Example], images: PreviewImages
) -> ReportData:
    return ReportData(
        record.meta(),
        examples,
        record.losses,
        record.curves,
        images.columns,
        images.thumbnails,
        record.checks,
    )


def _check(name: str, check: Callable[[], CheckResult], shared: bool = False) -> list[CheckResult]:
    """The result of a check. A check that raises an exception is skipped."""
    try:
        return [check()]
    except Exception as error:
        if shared and is_out_of_memory(error):
            raise
        return [_skipped(name, error)]


def _skipped(name: str, error: Exception) -> CheckResult:
    short = "out of memory" if is_out_of_memory(error) else type(error).__name__
    free_frames(error)
    log.warning("a check of the result is skipped: %s (%s)", short, error)
    return CheckResult(name, SKIPPED, f"{short} ({error})")


@contextmanager
def keep_weights_on_error(loop: Loop, path: Path, saver: Saver) -> Iterator[None]:
    """Saves the weights as `…-failed.zip` if an error inside prevents weights.zip.

    The file can be used like weights.zip. Weights that are not finite are not saved.
    """
    try:
        yield
    except (Worthless, Diverged):
        raise
    except Exception as error:
        # Out of memory: the run will be resumed. A full training has them in its last checkpoint.
        if not is_out_of_memory(error) and loop.full is None:
            with _warn_on_error("the trained weights cannot be saved"):
                _unchecked(path).unlink(missing_ok=True)
                failed = path.with_stem(f"{path.stem}-failed")
                archive = Archive(*loop.final_weights(), describe_weights(loop.settings))
                saver.with_reserve(lambda: write_archive(archive, failed))
                log.warning("the trained weights are saved as %s", failed)
        raise
    finally:
        with suppress(OSError):
            if _unchecked(path).is_dir():
                shutil.rmtree(_unchecked(path))
            _unchecked(path).unlink(missing_ok=True)


def evaluate(outcome: Outcome) -> Verdict:
    """Generates images with weights.zip, completes its meta.json, and writes report and record.

    Returns the verdict, which is also the last line of the log. Errors are warnings, since
    weights.zip is complete before.
    """
    found = [*outcome.record.checks, *_image_checks(outcome)]
    record = replace(outcome.record, checks=found)
    for check in found:
        outcome.events.emit("check", **check.plain())
    outcome.events.phase("writing")
    with _warn_on_error(f"{outcome.path} lacks the check results"):
        if outcome.archive.model is not None:
            write_meta(record.meta(), outcome.path)
        else:
            write_archive(replace(outcome.archive, meta=record.meta()), outcome.path)
    page = outcome.path.with_name(report.NAME)
    with _warn_on_error(f"{page} is not written"):
        report.write_report(_report_data(record, outcome.examples, outcome.preview_images), page)
        log.info("wrote %s", page)
    phases = outcome.events.seconds()
    with _warn_on_error("record.json is not written"):
        timings = replace(record.timings, phases=phases)
        replace(record, timings=timings).write(outcome.path.parent)
    parts = ", ".join(f"{name} {each:.1f} s" for name, each in phases.items())
    log.info("%.1f s in all: %s", sum(phases.values()), parts)
    log_verdict(found, record.verdict)
    return record.verdict


@contextmanager
def _warn_on_error(what: str) -> Iterator[None]:
    """Logs an error inside as a warning that starts with its consequence, `what`."""
    try:
        yield
    except Exception as error:
        log.warning("%s: %s: %s", what, type(error).__name__, error)


def _unchecked(path: Path) -> Path:
    return path.with_stem(f"{path.stem}-unchecked")


def without_subject(prompt: str, *tokens: str) -> str:
    """The prompt with every token replaced by "something"; `WITHOUT_SUBJECT` if it has none."""
    if not any(mentions(prompt, token) for token in tokens):
        return WITHOUT_SUBJECT
    about = "something".join(re.split("|".join(map(whole_word, tokens)), prompt))
    return re.sub(r"\b(an?) something\b", "something", about)


def _image_checks(outcome: Outcome) -> list[CheckResult]:
    """The checks that need images. A check that raises an exception is skipped."""
    if not outcome.settings.sample_prompts:
        return [
            CheckResult(
                result_checks.PREVIEW, SKIPPED, "no image was generated; give sample_prompts"
            )
        ]
    free_memory()  # of the training
    found: list[CheckResult] = []
    try:
        _compare_images(outcome, found)
    except Exception as error:
        found.append(_skipped(result_checks.PREVIEW, error))
    return found


@torch.no_grad()  # as previews: code that is compiled for them is not compiled again
def _compare_images(outcome: Outcome, found: list[CheckResult]) -> None:
    """Generates images as inference does: with the unchanged base and the archive from disk.

    The base is the one in memory, else it is loaded. Adds the check results to `found` one by one.
    """
    settings, preview_images = outcome.settings, outcome.preview_images
    shipped = outcome.record.curves.shipped
    step = settings.steps if shipped is None else shipped
    archive = read_weights(outcome.path)
    family = outcome.family
    if family is None:
        family = load_family(settings.base)
        if outcome.needs_offload:
            check_originals_fit(family)
            family.set_storage(WeightStorage(offload=True))
    merger = None if archive.model is not None else LoraMerger(family.transformer)

    def apply(scale: float) -> None:
        if merger is not None:
            merger.apply([(archive.deltas, scale)])
        elif family.base.folder != outcome.path.absolute():
            family.release("transformer")
            family.base = with_transformer(family.base, outcome.path)

    vectors = {token: rows.to(family.device) for token, rows in archive.vectors.items()}
    all_resolved = preview_requests(settings, family)
    first = replace(all_resolved[0], seeds=all_resolved[0].seeds[:1])
    prompt = without_subject(first.prompt, *settings.tokens)

    def controls(number: int) -> list[Image.Image]:
        return [each.image(None) for each in pair_of(number, outcome.examples).controls]

    if settings.pairs and prompt == WITHOUT_SUBJECT:
        prompt = drift_prompts(settings)[0]
    neutral = replace(first, prompt=prompt)

    # First the base, then with the LoRA.
    base = generate(family, neutral, reference_images=controls(0))[0]
    apply(1.0)
    adapted = generate(family, neutral, reference_images=controls(0))[0]
    pair = base, adapted, neutral.prompt
    found.append(result_checks.drift_of_images(*pair, lora=archive.model is None))
    apply(sample_scale(settings))
    # The last previews are of the weights of the last step.
    if step == settings.steps and step in preview_images.thumbnails and preview_images.last:
        [generated] = generate(family, first, vectors, reference_images=controls(0))
        kernels = Kernels.of(family)
        found.insert(
            0,
            result_checks.previews_match(
                preview_images.last[0], generated, outcome.kernels, kernels
            ),
        )
        return
    images = [
        generate(family, resolved, vectors, reference_images=controls(number))
        for number, resolved in enumerate(all_resolved)
    ]
    with _warn_on_error("the images of the last step are not written"):
        preview_images.add(step, images)
