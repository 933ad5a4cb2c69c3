"""report.html: a run on one page, for evaluation and for sharing.

The page is a single file with its style, curves and small copies of the images. It loads nothing
and runs no script; its Content-Security-Policy enforces that. The template,
`templates/report.html`, escapes every value.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.files.atomic import atomic_file
from adapters.forms import Form
from charts import Line, chart, smoothed, thinned
from families.tokens import mentions
from trainer.data import Example
from trainer.monitor import Curves, step_label, thumbnail
from trainer.result.meta import tokens_in
from trainer.result.result_checks import DOUBTFUL, FAILED, INFORMATION, PASSED, SKIPPED, CheckResult
from trainer.result.verdict import BROKEN, GOOD, verdict
from trainer.templating import TEMPLATES

NAME = "report.html"
IMAGES = 60  # of the dataset, at most, so that a page has only a few megabytes
FRAMES = 12  # previews of one prompt, at most
PIXELATED = 128  # pixels; images up to this size are scaled without interpolation
# Classes of report.css for the states of checks and of the result.
_STYLE = {
    **{GOOD: "passed", DOUBTFUL: "doubtful", BROKEN: "failed"},
    **{PASSED: "passed", FAILED: "failed", SKIPPED: "skipped", INFORMATION: "reported"},
}


@dataclass(frozen=True)
class ReportData:
    """The data of a report."""

    meta: Mapping[str, Any]  # as in meta.json
    examples: Sequence[Example]
    losses: Sequence[float]  # one per step
    curves: Curves  # empty if not measured
    prompts: Sequence[str]  # one per column of the previews
    previews: Mapping[int, Sequence[Image.Image]]  # small, by step, one per column
    checks: Sequence[CheckResult] = ()


def write_report(data: ReportData, path: Path) -> Path:
    """Writes the page atomically."""
    with atomic_file(path) as file:
        file.write(page(data).encode(errors="replace"))  # file names may not be valid Unicode
    return path


def page(data: ReportData) -> str:
    """The page as HTML."""
    tokens = tokens_in(data.meta)
    return TEMPLATES.get_template(NAME).render(
        **vars(data),
        tokens=tokens,
        lora=(lora := "trained" not in data.meta),
        kind="A LoRA" if lora else "A fully trained model",
        result=verdict(data.checks, validated=bool(data.curves.held_out)),
        style=_STYLE,
        without_token=[
            bool(tokens) and not any(mentions(each, token) for token in tokens)
            for each in data.prompts
        ],
        figures=_figures(data),
        steps=_spread(sorted(data.previews), FRAMES),
        charts=_charts(data),
        settings=_settings(data.meta),
        most_images=IMAGES,
        pixelated=PIXELATED,
        label=step_label,
        plain=_plain,
        thumbnail=thumbnail,
        webp=_webp,
    )


def _figures(data: ReportData) -> list[tuple[str, str]]:
    """The numbers at the top, by name."""
    training, curves = data.meta["training"], data.curves
    figures = [("Images", f"{len(data.examples)}"), ("Steps", f"{data.meta['steps']:,}")]
    if "trained" not in data.meta:  # a LoRA
        figures.append(("Adapter", str(Form.of(data.meta))))
    if captions := data.meta.get("dataset", {}).get("captions"):
        figures.append(("Captions", f"{captions['own']} own, {captions['default']} default"))
    if len(curves.steps) > 1 and curves.means[0] > 0:
        change = 100 * (curves.result / curves.means[0] - 1)
        name = "Validation loss" if curves.held_out else "Fit"
        figures.append((name, f"{change:+.1f} %".replace("-", "\u2212")))
    if training.get("loss_last") is not None:
        figures.append(("Training loss, end", f"{training['loss_last']:.4g}"))
    if training.get("steps_per_second"):
        figures.append(("Steps per second", f"{training['steps_per_second']:.3g}"))
    return figures


def _charts(data: ReportData) -> list[dict[str, str]]:
    """Title, hint and SVG of each chart."""
    charts = []
    if len(data.losses) > 1:
        steps = range(1, len(data.losses) + 1)
        window = max(1.0, len(data.losses) / 20)
        mean = smoothed(data.losses, window)
        lines = [
            Line(thinned(list(zip(steps, data.losses, strict=True))), "raw"),
            Line(thinned(list(zip(steps, mean, strict=True))), "main", f"{mean[-1]:.3g}"),
        ]
        hint = f"Each step samples its own noise; the thick line averages {window:.0f} steps."
        svg = chart(lines, "step", "training loss by step")
        charts.append({"title": "Training loss", "hint": hint, "svg": svg})
    curves = data.curves
    if len(curves.steps) > 1:
        columns = [*zip(*curves.losses, strict=True), tuple(curves.means)]
        styles = [f"s{level}" for level in range(len(curves.sigmas))] + ["mean"]
        names = [f"\u03c3 {sigma:.2f}" for sigma in curves.sigmas] + ["mean"]
        lines = [
            Line(
                [
                    (step, 100 * (value / values[0] - 1))
                    for step, value in zip(curves.steps, values, strict=True)
                ],
                *(style, name, True),
            )
            for values, style, name in zip(columns, styles, names, strict=True)
            if values[0] > 0
        ]
        title = "Validation loss" if curves.held_out else "Fit: loss on training images"
        of = (
            f"on {len(curves.held_out)} images that are not trained on"
            if curves.held_out
            else "on training images. No image was held out, so this validates nothing"
        )
        name, mark = f"{title} by step, change from the base", None
        if curves.shipped is not None:
            mark = (curves.shipped, f"saved: step {curves.shipped:,}")
        charts.append(
            {
                "title": f"{title}, change from the base",
                "hint": f"Fixed noise at four timesteps (\u03c3), {of}.",
                "svg": chart(lines, "step", name, True, mark),
            }
        )
    return charts


def _settings(meta: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings and their values, by name; those without a value are omitted."""
    return [
        (name, value)
        for name, value in sorted(meta["settings"].items())
        if value not in (None, "", (), [], {})
        and name not in ("sample_prompts", "preserve_prompts")
    ]


def _webp(image: Image.Image, lossless: bool) -> str:
    """The image as WebP in base64."""
    encoded = io.BytesIO()
    image.convert("RGB").save(encoded, format="webp", lossless=lossless, quality=82)
    return base64.b64encode(encoded.getvalue()).decode()


def _plain(value: Any) -> str:
    """A setting's value as readable text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spaced, including the first and the last."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(k * (len(steps) - 1) / (most - 1))] for k in range(most)]
