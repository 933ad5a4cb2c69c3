"""The checks of a run's result, each with its limit.

A check returns a state, a sentence and, if it measures something, a number.
`trainer.result.verdict` summarizes them. A failed check makes the result broken. If the weights are
unusable, the run ends with an error and the weights are saved under another name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops, ImageStat
from torch import Tensor

from adapters.archive import Archive, BrokenArchive, read_archive
from adapters.formats import Deltas, Dora, as_delta, as_written
from families.family import Family
from inference.acceleration import is_compiled
from trainer.monitor import Curves

# Mean difference, in levels of 255, between a preview (compiled blocks) and the image at inference.
# Measured in November 2026, with different kernels: 0.5 (H100, Z-Image-Turbo at its published size
# with random weights, 1024 pixels, 8 steps) and 1.3 (CPU, bfloat16, a small random model).
# For different images, the demo's LoRA on miniature-turbo: 2.2 to 8.7 at scale 0.75, 2.8 to 10.7
# with another seed, 14 to 34 without the LoRA.
PREVIEW_LIMIT = 2.0

# The next limits separate good from broken runs of miniature-turbo, measured in November 2026 on a
# CPU: 20 to 100 steps with the demo's 16 images, and with 5 photographs, which the miniature was
# not trained on and predicts worst. Learning rates are multiples of 0.004.
#
#                               |dW| / |W|      drift          loss, end / base
#   default, demo               0.06 to 0.13    0.18, 0.36     0.28 to 0.54
#   preset quick_test           0.19            0.26           0.24
#   character, 500 steps        0.30            0.41           0.05
#   default, photographs        0.08 to 0.16    0.63           0.34 to 0.53
#   x 5, demo                   0.34 to 0.41    0.43           0.26 to 0.55
#   x 10, demo                  1.43            0.90           1.66
#   x 20, demo, photographs     10 to 15        0.87, 0.97     1.70 to 1.82, 0.75 to 0.79
#   1 (x 250), demo             22 to 1100      1.00           1.87 to 6.1
#   1 (x 250), photographs      1.4 to 1200     1.08 to 1.99   0.81 to 2.6
#   default, images of noise    0.12            0.99           0.54
#
# Those rows are without preservation, and their drift is of one prompt, built from a caption. With
# preservation, and the drift of 8 prompts, on the demo's images with seed 1 (`likeness` and the
# share of other prompts all right are the judge's; untrained: 0.38 and 0.92):
#
#                               |dW| / |W|  drift  loss, end / base  likeness  other prompts right
#   0.006, 60 steps             0.13        0.19   0.33              0.50      0.79
#   0.02, 60 steps              0.38        0.26   0.28              0.55      0.75
#   0.04, 20 steps of 2         1.45        0.99   1.92              0.29      0
#   1, 4 steps of 2             113         1.78   5.95              0.10      0
#
# On photographs the loss falls even if the model generates noise: the base is worse than that.
# |dW| / |W|: an update as large as the weights destroys the base model.
UPDATE_DOUBTFUL, UPDATE_FAILED = 0.5, 1.0
# |v_adapted - v_base| / |v_base|: 1 is the drift of a model that predicts zero.
DRIFT_DOUBTFUL, DRIFT_FAILED = 0.7, 0.8
# The loss is measured on fixed noise, so without learning it equals the base's exactly. On held-out
# images a LoRA that overfits ends above the base, and may still be a good one: the default run with
# 22 images of the robot ends 11 % above it, with the best likeness (docs/training.md). Broken runs
# end 66 % above it and more.
FIT_LIMIT, VALIDATION_LIMIT = 0.05, 0.5

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
UPDATE, DRIFT = "size of the update", "drift without the subject"
LOSS_FELL, FIT_FELL = "the validation loss fell", "the loss on the training images fell"
PREVIEW = "the last preview can be reproduced"  # from weights.zip
DOUBTFUL = "doubtful"  # between the two limits of a check
INFORMATION = "for information"  # has no limit


class Worthless(RuntimeError):
    """The trained weights are unusable."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    name: str
    state: str  # passed, doubtful, failed, skipped, for information
    sentence: str
    value: float | None = None  # the measurement
    worthless: bool = False  # failed, and the weights are unusable

    def plain(self) -> dict[str, Any]:
        """The result as JSON types."""
        return asdict(self)


def _between(name: str, value: float, doubtful: float, failed: float, sentence: str) -> CheckResult:
    """A check with two limits; NaN exceeds both. The sentence names the limit exceeded."""
    if value <= doubtful:
        return CheckResult(name, PASSED, sentence, value)
    state, limit = (DOUBTFUL, doubtful) if value <= failed else (FAILED, failed)
    sentence = f"{sentence}; the limit is {100 * limit:g} %"
    return CheckResult(name, state, sentence, value if math.isfinite(value) else None)


def learned(deltas: Deltas) -> CheckResult:
    """Whether every LoRA layer, rounded as in the file, has a finite update that is not zero.

    `value` is the share of layers that have. Of DoRA, that of the pair A and B counts.
    """
    rounded = as_written(deltas)
    pairs = {
        name: each.direction if isinstance(each, Dora) else each for name, each in rounded.items()
    }
    return all_changed({name: each.norm() or 0.0 for name, each in pairs.items()})


def all_changed(norms: Mapping[str, float], what: str = "LoRA layers") -> CheckResult:
    """`learned` by the norms of the updates, of layers that are called `what`."""
    name = "every layer was trained"
    broken = [layer for layer, norm in norms.items() if not math.isfinite(norm)]
    unchanged = [layer for layer, norm in norms.items() if norm == 0]
    share = 1 - (len(broken) + len(unchanged)) / max(1, len(norms))
    if broken:
        sentence = f"{_listed(broken, norms, what)} contain NaN or infinity; lower learning_rate"
        return CheckResult(name, FAILED, sentence, share, worthless=True)
    if len(unchanged) == len(norms):
        sentence = f"none of {len(norms)} {what} has an effect; raise learning_rate or steps"
        return CheckResult(name, FAILED, sentence, share, worthless=True)
    if unchanged:
        return CheckResult(name, FAILED, f"{_listed(unchanged, norms, what)} have no effect", share)
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    sentence = f"all {len(norms)} {what} change their weights; total |dW| = {total:.4g}"
    return CheckResult(name, PASSED, sentence, share)


def update_size(changes: Mapping[str, tuple[float, float]]) -> CheckResult:
    """The size of the update relative to the weights that are changed.

    `changes`: |dW| and |W| by layer (`Lora.changes`, `FullWeights.changes`). `value` is |dW| / |W|
    over all of them.
    """
    total, base = (math.hypot(*norms) for norms in zip(*changes.values(), strict=True))
    share = total / base if base > 0 else math.nan
    sentence = f"|dW| is {100 * share:.3g} % of |W| over {len(changes)} layers"
    if not share <= UPDATE_DOUBTFUL:
        sentence += "; lower learning_rate"
    return _between(UPDATE, share, UPDATE_DOUBTFUL, UPDATE_FAILED, sentence)


def token_moved(token: str, facts: Mapping[str, float]) -> CheckResult:
    """Whether the token's embedding was trained. `value` is its norm at the end."""
    name, norm = f"{token} was trained", facts["norm_end"]
    at_start = not facts["moved"]
    if not facts["steps_with_placeholder"]:
        sentence = f"no step used {token}; train for more steps, or lower caption_dropout"
        return CheckResult(name, FAILED, sentence, norm, worthless=at_start)
    if at_start:
        sentence = (
            f"its embedding is exactly as before training (norm {norm:.4g}); "
            "raise placeholder_learning_rate"
        )
        return CheckResult(name, FAILED, sentence, norm, worthless=True)
    steps = facts["steps_with_placeholder"]
    sentence = (
        f"the norm went from {facts['norm_start']:.4g} to {norm:.4g}; {steps:,} steps used it"
    )
    return CheckResult(name, PASSED, sentence, norm)


def reloads(archive: Archive, path: Path) -> CheckResult:
    """Whether the file at `path` contains exactly the archive, rounded as written."""
    name = "the file can be read back"

    def failed(sentence: str) -> CheckResult:
        return CheckResult(name, FAILED, sentence, worthless=True)

    try:
        read = read_archive(path)
    except BrokenArchive as error:
        return failed(f"the file is invalid: {error}")
    wanted = as_written(archive.deltas)
    if read.deltas.keys() != wanted.keys():
        odd = sorted(read.deltas.keys() ^ wanted.keys())
        return failed(f"{_listed(odd, wanted)} are not in both the file and the trained weights")
    changed = [
        layer
        for layer, delta in wanted.items()
        if not _equal(delta.parts(), as_delta(read.deltas[layer]).parts())
    ]
    if changed:
        return failed(f"{_listed(changed, wanted)} differ from the trained weights")
    if not same_vectors(archive, read):
        return failed("the placeholder differs from the trained one")
    tokens = "".join(f" and {token}" for token in archive.vectors)
    sentence = f"{len(wanted)} layers{tokens} in the file equal the trained weights exactly"
    return CheckResult(name, PASSED, sentence)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(map(torch.equal, one.values(), other.values()))


def same_vectors(one: Archive, other: Archive) -> bool:
    """Whether both have exactly the same tokens in the same order."""
    return _equal(one.vectors, other.vectors)


@dataclass(frozen=True)
class Kernels:
    """Device, dtype and compilation of a generation: equal ones give equal images on a CPU.

    Not on a GPU, where libraries choose algorithms by free memory.
    """

    device: str  # its type
    dtype: torch.dtype
    compiled: bool = False

    @classmethod
    def of(cls, family: Family) -> "Kernels":
        """The current kernels of a family."""
        return cls(family.device.type, family.dtype, is_compiled(family.transformer))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device}, {dtype}{', compiled' * self.compiled}"


def previews_match(
    preview: Image.Image, generated: Image.Image, preview_kernels: Kernels, kernels: Kernels
) -> CheckResult:
    """Whether the last preview equals the image that inference with the weights generates.

    `value` is the largest difference of a pixel, in levels of 255. It must be 0 if both images
    used the same kernels on a CPU; else the mean difference must be below `PREVIEW_LIMIT`.
    """
    name = PREVIEW
    if preview.size != generated.size:
        return CheckResult(
            name, FAILED, f"the preview has {preview.size} pixels, not {generated.size}"
        )
    difference = ImageChops.difference(preview.convert("RGB"), generated.convert("RGB"))
    largest = float(max(high for _, high in difference.getextrema()))  # type: ignore[misc]
    mean = sum(ImageStat.Stat(difference).mean) / 3
    if largest == 0:
        sentence = "the last preview equals the image of the written weights exactly"
        return CheckResult(name, PASSED, sentence, largest)
    exact = preview_kernels == kernels and kernels.device == "cpu"
    sentence = (
        f"the preview and the image of the written weights differ by {mean:.3f} levels of 255 on "
        "average"
    )
    if exact:
        sentence += f"; both used the same kernels ({kernels}), so they must be equal"
        return CheckResult(name, FAILED, sentence, largest)
    sentence += (
        f"; the limit is {PREVIEW_LIMIT:g}, since kernels round differently "
        f"({preview_kernels}; {kernels})"
    )
    return CheckResult(name, PASSED if mean < PREVIEW_LIMIT else FAILED, sentence, largest)


def drift_of_images(
    base: Image.Image, adapted: Image.Image, prompt: str, lora: bool = True
) -> CheckResult:
    """How much an image without the subject changes. `value` is the PSNR in dB; None if equal.

    PSNR = 20 log10(255 / RMS difference). It has no limit, since a slight change of brightness and
    a different image can have the same PSNR.
    """
    name = "drift of an image without the subject"
    difference = ImageChops.difference(base.convert("RGB"), adapted.convert("RGB"))
    squares = [each**2 for each in ImageStat.Stat(difference).rms]
    rms = math.sqrt(sum(squares) / len(squares))
    if rms == 0:
        return CheckResult(name, INFORMATION, f"the image of {prompt!r} equals the base model's")
    psnr = 20 * math.log10(255 / rms)
    applied = "with the LoRA applied (apply_lora: always), " * lora
    sentence = (
        f"{applied}the image of {prompt!r} differs from the base model's by {rms:.1f} levels of 255"
    )
    return CheckResult(name, INFORMATION, f"{sentence} (RMS): PSNR {psnr:.1f} dB", psnr)


def drift_of_velocity(share: float, prompts: int) -> CheckResult:
    """`share` is |v_adapted - v_base| / |v_base| (`trainer.result.drift`)."""
    sentence = (
        f"for {prompts} prompts without the subject the velocity changes by {100 * share:.3g} % of "
        "the base model's"
    )
    return _between(DRIFT, share, DRIFT_DOUBTFUL, DRIFT_FAILED, sentence)


def loss_fell(curves: Curves) -> CheckResult:
    """Whether the loss on fixed noise is lower at the end than for the base. `value`: end / base.

    On held-out images this is the validation loss; on training images it only shows the fit.
    """
    name = LOSS_FELL if curves.held_out else FIT_FELL
    if len(curves.steps) < 2:
        return CheckResult(name, SKIPPED, "not measured, since validation_every is 0")
    first, last = curves.means[0], curves.result
    ratio = last / first if first > 0 else math.nan
    sentence = f"from {first:.4f} (base) to {last:.4f}, {100 * (ratio - 1):+.1f} %"
    if curves.shipped is not None:
        sentence += f", at step {curves.shipped:,}, whose weights are saved"
    if curves.held_out:
        sentence += f", on {len(curves.held_out)} held-out images"
    best = min(range(len(curves.means)), key=curves.means.__getitem__)
    if curves.means[best] < 0.98 * last:
        sentence += f"; the lowest was {curves.means[best]:.4f} at step {curves.steps[best]:,}"
    if ratio < 1:
        return CheckResult(name, PASSED, sentence, ratio)
    limit = VALIDATION_LIMIT if curves.held_out else FIT_LIMIT
    if ratio <= 1 + limit:
        return CheckResult(name, DOUBTFUL, f"{sentence}; it did not fall", ratio)
    sentence += f"; the limit is {100 * limit:+g} %"
    return CheckResult(name, FAILED, sentence, ratio if math.isfinite(ratio) else None)


def _listed(layers: Sequence[str], of: Mapping[str, Any], what: str = "LoRA layers") -> str:
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return f"{len(layers)} of {len(of)} {what} ({', '.join(layers[:3])}{more})"
