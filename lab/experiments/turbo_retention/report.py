"""Writes what was measured into docs/turbo.md, between its marks."""

from dataclasses import replace
from itertools import product
from pathlib import Path

from lab.experiments.document import rewrite, table
from lab.experiments.turbo_retention.curves import (
    FREE_RIGHT,
    LIKENESS,
    OWN_BASE,
    PAIRED,
    SUBJECT_RIGHT,
    TOLD,
)
from lab.experiments.turbo_retention.design import (
    CONDITIONS,
    EIGHT,
    FEW,
    TURBO,
    UNDISTILLED,
    WEAKER,
)
from lab.experiments.turbo_retention.findings import findings
from lab.experiments.turbo_retention.results import Curve, Results
from lab.experiments.turbo_retention.study import MERGED

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "turbo.md"

BASES = {TURBO: "turbo", MERGED: "turbo + adapter", UNDISTILLED: "undistilled base"}
NAMES = [condition.name for condition in CONDITIONS]
TITLES = [condition.title for condition in CONDITIONS]


def write_report(published: Path, folder: Path | None, document: Path) -> None:
    """Rewrites the measured part of the document and its plots.

    The image grid needs the images in the `folder` of a run; without one it stays.
    """
    from lab.experiments.turbo_retention.figures import draw_curves, draw_pictures

    results = Results.read(published)
    images = rewrite(document, parts(results))
    draw_curves(results, images / "turbo_retention.png")
    if folder is not None:
        draw_pictures(results, folder, images / "turbo_pictures.png")


def parts(results: Results) -> dict[str, str]:
    """What was measured, as Markdown, by the document's part."""
    return {"findings": findings(results), "figures": figures(results)}


def figures(results: Results) -> str:
    """All figures, as tables."""
    adapter, direct, undistilled = NAMES
    tables = [
        _bases(results),
        _pairs(results, direct, adapter),
        _pairs(results, adapter, undistilled),
        _default(results),
        _weaker(results),
        *(_curve(results, each) for each in TOLD),
        _own_base(results),
    ]
    return "\n\n".join(filter(None, tables))


def _bases(results: Results) -> str:
    """The bases without any LoRA."""
    columns = {"right": ".1f", "whole": ".1f", "sharpness": ".4f", "distance": ".2f"}
    rows = [
        [f"{title}, {way.name}"]
        + [
            f"{results.untouched(measure, 'free', way, base).mean():{digits}}"
            for measure, digits in columns.items()
        ]
        for base, title in BASES.items()
        for way in (FEW, EIGHT)
    ]
    header = ["", "attributes right, %", "all right, %", "sharpness", "distance"]
    return table("Before any training, on prompts without the subject", header, rows)


def _default(results: Results) -> str:
    """A plain `train`: what it learned, and what it cost."""
    if not results.steps("default"):
        return ""
    (step,) = results.steps("default")
    seeds = len(results.seeds("default", step))
    rows = [
        [curve.title]
        + [results.estimate(curve, name, "default", step).text(curve.digits) for name in NAMES]
        for curve in TOLD
    ]
    pairs = [(curve, "untouched") for curve in (SUBJECT_RIGHT, FREE_RIGHT)]
    pairs += [(curve, "undistilled") for curve in (LIKENESS, SUBJECT_RIGHT, FREE_RIGHT)]
    rows += [
        [f"{curve.title}: against {'untouched turbo' if other == 'untouched' else 'the third'}"]
        + [
            "" if name == other else _signed(results, curve, name, other, "default", step)
            for name in NAMES
        ]
        for curve, other in pairs
    ]  # fmt: skip
    title = f"The miniature's own settings, {step} steps, {seeds} seed{'s' if seeds > 1 else ''}"
    return table(title, ["", *TITLES], rows)


def _signed(results: Results, curve: Curve, name: str, other: str, plan: str, step: int) -> str:
    more = results.against(curve, name, other, plan, step)
    return ("+" if round(more.mean, curve.digits) > 0 else "") + more.text(curve.digits)


def _pairs(results: Results, name: str, other: str) -> str:
    """One condition minus another, on the same prompts and seeds."""
    titles = {condition.name: condition.title for condition in CONDITIONS}
    steps = results.steps("curve")
    rows = [
        [curve.title] + [_signed(results, curve, name, other, "curve", step) for step in steps]
        for curve in PAIRED
    ]
    rows.append(["training seeds", *(str(len(results.seeds("curve", step))) for step in steps)])
    header = ["", *(f"{step} steps" for step in steps)]
    return table(f"{titles[name].capitalize()} minus {titles[other]}", header, rows)


def _curve(results: Results, curve: Curve) -> str:
    """One measure: steps down, conditions across."""
    rows = [
        [str(step)]
        + [results.estimate(curve, name, "curve", step).text(curve.digits) for name in NAMES]
        for step in results.steps("curve")
    ]
    if curve.way is not None:
        for base in (MERGED, TURBO):
            level = f"{results.level(curve, base):.{curve.digits}f}"
            rows.insert(0, [f"0, {BASES[base]}", *[level] * len(NAMES)])
    return table(curve.title, ["steps", *TITLES], rows)


def _weaker(results: Results) -> str:
    """Finished LoRAs of the first condition at lower scales."""
    rows = []
    for plan in ("curve", "default"):
        for step, way in product(results.steps(plan)[-1:], (EIGHT, *WEAKER)):
            curves = [replace(curve, way=way) for curve in (LIKENESS, SUBJECT_RIGHT, FREE_RIGHT)]
            found = [results.estimate(curve, NAMES[0], plan, step) for curve in curves]
            cells = [each.text(c.digits) for each, c in zip(found, curves, strict=True)]
            rows.append([f"{plan}, {step} steps", f"{way.scale:g}", *cells])
    header = ["training", "scale", "likeness", "right, with the subject, %", "right, other, %"]
    return table("A LoRA at a lower scale, turbo with the adapter, 8 steps", header, rows)


def _own_base(results: Results) -> str:
    """The third condition where it was trained, with that base model's settings."""
    rows = [
        [str(step), results.estimate(OWN_BASE, "undistilled", "curve", step).text()]
        for step in results.steps("curve")
    ]
    return table("LoRAs of the undistilled base on that base", ["steps", OWN_BASE.title], rows)
