"""Gates: what is asked of a training before its archive is handed over.

Each gate gives a number and a sentence. One that fails is a warning, unless it means that the
archive is worthless: then the training fails, and the archive is kept under another name.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops, ImageStat
from torch import Tensor

from adapters.archive import Archive, BrokenArchive, read_archive
from adapters.factors import Factors
from adapters.lora_file import as_written
from families.family import Family
from inference.acceleration import is_compiled
from trainer.validation import Curves

log = logging.getLogger(__name__)

# Levels of 255, mean over an image, between a preview by compiled blocks and the prediction. On an
# H100 it was 0.5 (Z-Image-Turbo at its published size, random weights, 1024 pixels, 8 steps, 25
# November 2026); another image differs by tens.
PREVIEW_LIMIT = 1.0

PASSED, FAILED, REPORTED, SKIPPED = "passed", "failed", "reported", "skipped"


class Worthless(RuntimeError):
    """A training whose archive is of no use."""


@dataclass(frozen=True)
class Gate:
    """The result of one gate."""

    name: str
    state: str  # passed, failed, reported (nothing is asked of the value), skipped
    sentence: str
    value: float | None = None  # of the sentence's measure, where it has one
    worthless: bool = False  # failed, and the archive is of no use

    def plain(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return asdict(self)


def learned(factors: Factors) -> Gate:
    """Whether every LoRA layer changes its weight, by finite numbers, as written.

    `value` is the share of layers that do.
    """
    name, rounded = "every layer has learned", as_written(factors)
    norms = {layer: update_norm(down, up) for layer, (down, up) in rounded.items()}
    broken = [layer for layer, norm in norms.items() if not math.isfinite(norm)]
    still = [layer for layer, norm in norms.items() if norm == 0]
    share = 1 - (len(broken) + len(still)) / max(1, len(norms))
    if broken:
        sentence = f"{_listed(broken, norms)} hold NaN or infinity; lower learning_rate"
        return Gate(name, FAILED, sentence, share, worthless=True)
    if len(still) == len(norms):
        sentence = (
            f"none of {len(norms)} LoRA layers changes anything; raise learning_rate or steps"
        )
        return Gate(name, FAILED, sentence, share, worthless=True)
    if still:
        return Gate(name, FAILED, f"{_listed(still, norms)} change nothing", share)
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    sentence = f"all {len(norms)} LoRA layers change their weights; together |dW| = {total:.4g}"
    return Gate(name, PASSED, sentence, share)


def update_norm(down: Tensor, up: Tensor) -> float:
    """The norm of B @ A without making it: |BA|^2 = sum((B^T B) * (A A^T)), in float64."""
    down, up = down.double(), up.double()
    squared = ((up.T @ up) * (down @ down.T)).sum().item()
    return math.sqrt(squared) if squared > 0 else 0.0 if squared <= 0 else math.nan


def reloads(archive: Archive, path: Path) -> Gate:
    """Whether the file at `path`, read back, is the archive: rounded as written, bit for bit."""
    name = "the archive reads back"

    def failed(sentence: str) -> Gate:
        return Gate(name, FAILED, sentence, worthless=True)

    try:
        read = read_archive(path)
    except BrokenArchive as error:
        return failed(f"the file is refused: {error}")
    wanted = as_written(archive.factors)
    if read.factors.keys() != wanted.keys():
        odd = sorted(read.factors.keys() ^ wanted.keys())
        return failed(f"{_listed(odd, wanted)} are not in both file and training")
    changed = [
        layer
        for layer, pair in wanted.items()
        if not all(map(torch.equal, pair, read.factors[layer]))
    ]
    if changed:
        return failed(f"{_listed(changed, wanted)} differ from what was trained")
    given, found = archive.placeholder, read.placeholder
    if (given is None) != (found is None) or (
        given is not None
        and found is not None
        and not (given.token == found.token and torch.equal(given.vectors, found.vectors))
    ):
        return failed("the placeholder differs from what was trained")
    word = f" and the word {given.token}" if given is not None else ""
    sentence = f"{len(wanted)} layers{word} are in the file as they were trained, bit for bit"
    return Gate(name, PASSED, sentence)


@dataclass(frozen=True)
class Kernels:
    """What an image was computed with: equal ones give equal images on a CPU.

    On a GPU not even these do, since its libraries choose algorithms by the memory that is free.
    """

    device: str  # its type
    dtype: torch.dtype
    compiled: bool = False

    @classmethod
    def of(cls, family: Family) -> "Kernels":
        """Those of a family as it is now."""
        return cls(family.device.type, family.dtype, is_compiled(family.transformer))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device}, {dtype}{', compiled' * self.compiled}"


def previews_match(
    preview: Image.Image, drawn: Image.Image, made_by: Kernels, drawn_by: Kernels
) -> Gate:
    """Whether the last preview is what a prediction with the archive generates.

    `value` is the largest difference of a pixel's level, of 255. It must be 0 where both images
    come from the same kernels on a CPU; else the mean difference must be below `PREVIEW_LIMIT`.
    """
    name = "the preview is what is drawn"
    if preview.size != drawn.size:
        return Gate(name, FAILED, f"the preview has {preview.size} pixels, not {drawn.size}")
    difference = ImageChops.difference(preview.convert("RGB"), drawn.convert("RGB"))
    largest = float(max(high for _, high in difference.getextrema()))  # type: ignore[misc]
    mean = sum(ImageStat.Stat(difference).mean) / 3
    if largest == 0:
        sentence = "the last preview equals the prediction with the archive, pixel for pixel"
        return Gate(name, PASSED, sentence, largest)
    exact = made_by == drawn_by and made_by.device == "cpu"
    sentence = f"preview and prediction differ by {mean:.3f} levels of 255 on average"
    if exact:
        sentence += f"; both are from the same kernels ({made_by}), so they should be equal"
        return Gate(name, FAILED, sentence, largest)
    sentence += (
        f"; the limit is {PREVIEW_LIMIT:g}, since kernels round differently ({made_by}; {drawn_by})"
    )
    return Gate(name, PASSED if mean < PREVIEW_LIMIT else FAILED, sentence, largest)


def drift_of_pictures(base: Image.Image, adapted: Image.Image, prompt: str) -> Gate:
    """How far a picture without the subject moved. `value` is its PSNR in dB; None if it did not.

    PSNR = 20 log10(255 / RMS difference); identical pictures have none.
    """
    name = "drift of a picture without the subject"
    difference = ImageChops.difference(base.convert("RGB"), adapted.convert("RGB"))
    squares = [each**2 for each in ImageStat.Stat(difference).rms]
    rms = math.sqrt(sum(squares) / len(squares))
    if rms == 0:
        return Gate(name, REPORTED, f"{prompt!r} draws the base's very picture")
    psnr = 20 * math.log10(255 / rms)
    sentence = f"{prompt!r} moves by {rms:.1f} levels of 255 (RMS) from the base's picture"
    return Gate(name, REPORTED, f"{sentence}: PSNR {psnr:.1f} dB", psnr)


def drift_of_velocity(share: float, prompt: str) -> Gate:
    """`share` is |v_adapted - v_base| / |v_base| over the validation's sigmas."""
    sentence = f"for {prompt!r} the velocity moves by {100 * share:.2f} % of the base's"
    return Gate("drift of the velocity without the subject", REPORTED, sentence, share)


def validation_fell(curves: Curves) -> Gate:
    """Whether the validation loss is lower at the end than with the base. `value`: end / base."""
    name = "the validation loss fell"
    if len(curves.steps) < 2:
        return Gate(name, SKIPPED, "validation_every is 0, so nothing was measured")
    first, last = curves.means[0], curves.means[-1]
    ratio = last / first if first > 0 else math.nan
    of = f"{len(curves.held_out)} pictures held out" if curves.held_out else "training pictures"
    sentence = f"from {first:.4f} (base) to {last:.4f}, {100 * (ratio - 1):+.1f} %, on {of}"
    best = min(range(len(curves.means)), key=curves.means.__getitem__)
    if curves.means[best] < 0.98 * last:
        sentence += f"; the lowest was {curves.means[best]:.4f} at step {curves.steps[best]:,}"
    return Gate(name, PASSED if ratio < 1 else FAILED, sentence, ratio)


def say(gates: Sequence[Gate]) -> None:
    """Logs every gate; a failed one is a warning."""
    for gate in gates:
        level = logging.WARNING if gate.state == FAILED else logging.INFO
        log.log(level, "gate %s: %s: %s", gate.state, gate.name, gate.sentence)


def _listed(layers: Sequence[str], of: Factors | dict[str, float]) -> str:
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return f"{len(layers)} of {len(of)} LoRA layers ({', '.join(layers[:3])}{more})"
