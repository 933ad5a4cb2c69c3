"""The numbers of a run, from its raw scores."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from lab.experiments.table import Row


@dataclass(frozen=True)
class Metric:
    """One number per run, from its row and the row of the same word on the untrained base."""

    name: str
    title: str
    better: str  # higher, lower, or neither: ""
    digits: int
    of: Callable[[Row, Row], float]


def _right(row: Row, prefix: str = "") -> float:
    return 100 * sum(row[f"{prefix}right"]) / sum(row[f"{prefix}asked"])


def _leak(row: Row, untrained: Row) -> float:
    """How often the word's old look shows, in percent; what the subject looks like is not leak.

    The old look is the shape and colour that the untrained base draws most often for the word.
    """
    drawn: list[str] = untrained["repeats_looks"]
    old = Counter(drawn).most_common(1)[0][0]
    shown = fmean(look == old for look in row["looks"])
    innocent = fmean(look == old for look in untrained["rendered_looks"])
    return 100 * (shown - innocent)


WORLD = (  # by the miniature's judge
    Metric("fidelity", "likeness to the subject", "higher", 3, lambda r, _: fmean(r["likeness"])),
    Metric("adherence", "attributes right, %", "higher", 1, lambda r, _: _right(r)),
    Metric("leak", "prior leak, %", "lower", 1, _leak),
    Metric("drift", "drift on other prompts", "lower", 3, lambda r, _: fmean(r["free_pixels"])),
    Metric("free", "other prompts right, %", "higher", 1, lambda r, _: _right(r, "free_")),
    Metric(
        "bleed",
        "bleed into the class word",
        "lower",
        3,
        lambda r, u: fmean(r["class_likeness"]) - fmean(u["class_likeness"]),
    ),
    Metric("class", "class word right, %", "higher", 1, lambda r, _: _right(r, "class_")),
    Metric("diversity", "diversity", "higher", 2, lambda r, _: r["diversity"]),
    Metric("sharpness", "sharpness", "", 4, lambda r, _: fmean(r["sharpness"])),
    Metric("contrast", "contrast", "", 3, lambda r, _: fmean(r["contrast"])),
    Metric("brightness", "brightness", "", 3, lambda r, _: fmean(r["brightness"])),
)

PHOTOGRAPHS = (  # by CLIP, which is asked about the class word, and LPIPS
    Metric("fidelity", "likeness to the subject", "higher", 3, lambda r, _: fmean(r["likeness"])),
    Metric("adherence", "likeness to the prompt", "higher", 3, lambda r, _: fmean(r["text"])),
    Metric(
        "leak",
        "prior leak",
        "lower",
        3,
        lambda r, _: fmean(r["old_look"]) - fmean(r["innocent"]),
    ),
    Metric("drift", "drift on other prompts", "lower", 3, lambda r, _: fmean(r["free_apart"])),
    Metric("free", "other prompts' likeness", "higher", 3, lambda r, _: fmean(r["free_text"])),
    WORLD[5],
    Metric("class", "class word's likeness", "higher", 3, lambda r, _: fmean(r["class_text"])),
    Metric("diversity", "diversity", "higher", 3, lambda r, _: fmean(r["apart"])),
    *WORLD[8:],
)
