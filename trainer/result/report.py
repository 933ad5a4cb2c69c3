"""report.html: one training on one page, to judge it by and to show to others.

The page is a single file. It holds its style, its curves and small copies of its pictures, loads
nothing and runs no script; the policy in its head makes browsers hold it to that. All text from
outside is escaped.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.files.atomic import atomic_file
from trainer.data import Example
from trainer.monitor import Curves, step_label, thumbnail
from trainer.result.charts import Line, chart, smoothed, thinned
from trainer.result.result_checks import DOUBTFUL, FAILED, INFORMATION, PASSED, SKIPPED, CheckResult
from trainer.result.verdict import BROKEN, GOOD, verdict

NAME = "report.html"
PICTURES = 60  # of the dataset that are shown; a page stays a few megabytes
FRAMES = 12  # of the previews of one prompt
PIXELATED = 128  # pixels; smaller pictures are shown with their pixels visible
# Classes of report.css for the states of checks and of the result.
_STYLE = {
    **{GOOD: "passed", DOUBTFUL: "doubtful", BROKEN: "failed"},
    **{PASSED: "passed", FAILED: "failed", SKIPPED: "skipped", INFORMATION: "reported"},
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class ReportData:
    """All that a report tells."""

    meta: Mapping[str, Any]  # as in meta.json
    examples: Sequence[Example]
    losses: Sequence[float]  # one per step
    curves: Curves  # empty where nothing was validated
    prompts: Sequence[str]  # one per column of the previews
    previews: Mapping[int, Sequence[Image.Image]]  # small, by step, one per column
    checks: Sequence[CheckResult] = ()


def write_report(data: ReportData, path: Path) -> Path:
    """Writes the page all at once."""
    with atomic_file(path) as file:
        file.write(page(data).encode(errors="replace"))  # a file's name may be no Unicode
    return path


def page(data: ReportData) -> str:
    """The page as HTML."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    title = f"{_subject(data.meta)} on {data.meta['base_model']}"
    sections = (_head, _figures, _previews, _curves, _gates, _dataset, _settings, _foot)
    body = "\n".join(part for part in (section(data) for section in sections) if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


# ---- The sections, in their order ----------------------------------------------------------------


def _head(data: ReportData) -> str:
    meta = data.meta
    result = verdict(data.checks, validated=bool(data.curves.held_out))
    chip = f'<span class="chip {_STYLE[result.result]}">{escape(str(result))}</span>'
    subject = meta.get("placeholder_token")
    what = f"A LoRA and the token {_word(subject)}" if subject else "A LoRA"
    return (
        '<header><p class="eyebrow">Training report</p>'
        f"<h1>{escape(_subject(meta))} on {escape(meta['base_model'])}</h1>"
        f'<p class="lead">{what}, trained for {meta["steps"]:,} steps on '
        f"{len(data.examples) - len(data.curves.held_out)} images.</p>{chip}</header>"
    )


def _figures(data: ReportData) -> str:
    training, curves = data.meta["training"], data.curves
    figures = [("Images", f"{len(data.examples)}"), ("Steps", f"{data.meta['steps']:,}")]
    figures.append(("Rank", f"{data.meta['rank']}"))
    if captions := data.meta.get("dataset", {}).get("captions"):
        figures.append(("Captions", f"{captions['own']} own, {captions['default']} default"))
    if len(curves.steps) > 1 and curves.means[0] > 0:
        change = 100 * (curves.means[-1] / curves.means[0] - 1)
        name = "Validation loss" if curves.held_out else "Fit"
        figures.append((name, f"{change:+.1f} %".replace("-", "\u2212")))
    if training.get("loss_last") is not None:
        figures.append(("Training loss, end", f"{training['loss_last']:.4g}"))
    if training.get("steps_per_second"):
        figures.append(("Steps per second", f"{training['steps_per_second']:.3g}"))
    cells = "".join(f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>" for a, b in figures)
    return f'<dl class="figures">{cells}</dl>'


def _previews(data: ReportData) -> str:
    if not data.previews:
        return ""
    steps = _spread(sorted(data.previews), FRAMES)
    strips = []
    for column, prompt in enumerate(data.prompts):
        frames = "".join(
            f"<figure>{_image(data.previews[step][column], f'{prompt}, {step_label(step)}')}"
            f"<figcaption>{'step ' if step else ''}{step_label(step)}</figcaption></figure>"
            for step in steps
        )
        strips.append(
            f'<div class="strip"><h3>{escape(prompt)}</h3><div class="frames">{frames}</div></div>'
        )
    hint = "Each prompt keeps its seed, so only the training changes its picture."
    return _section("Previews", hint, "".join(strips))


def _curves(data: ReportData) -> str:
    charts = []
    if len(data.losses) > 1:
        steps = range(1, len(data.losses) + 1)
        window = max(1.0, len(data.losses) / 20)
        mean = smoothed(data.losses, window)
        lines = [
            Line(thinned(list(zip(steps, data.losses, strict=True))), "raw"),
            Line(thinned(list(zip(steps, mean, strict=True))), "main", f"{mean[-1]:.3g}"),
        ]
        hint = f"Each step draws its own noise, so it jumps; the line averages {window:.0f} steps."
        resolved = chart(lines, "step", "training loss by step")
        charts.append(f'<div class="card"><h3>Training loss</h3><p>{hint}</p>{resolved}</div>')
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
        resolved = chart(lines, "step", f"{title} by step, change from the base", percent=True)
        charts.append(
            f'<div class="card"><h3>{title}, change from the base</h3>'
            f"<p>Fixed noise at four noise levels \u03c3, {of}.</p>{resolved}</div>"
        )
    return _section("Curves", "", f'<div class="charts">{"".join(charts)}</div>') if charts else ""


def _gates(data: ReportData) -> str:
    rows = "".join(
        f'<li><span class="chip small {_STYLE[check.state]}">{check.state}</span><div>'
        f'<strong>{escape(check.name)}</strong><span class="what">{escape(check.sentence)}</span>'
        "</div></li>"
        for check in data.checks
    )
    return _section("Checks", "", f'<ul class="card gates">{rows}</ul>') if rows else ""


def _dataset(data: ReportData) -> str:
    held = set(data.curves.held_out)
    figures = []
    for example in data.examples[:PICTURES]:
        mark = ' <span class="held">held out</span>' if example.name in held else ""
        figures.append(
            f"<figure>{_image(thumbnail(example.image()), example.caption)}"
            f'<figcaption>{escape(example.caption)}<span class="file">{escape(example.name)}, '
            f"{example.width}\u00d7{example.height}{mark}</span></figcaption></figure>"
        )
    more = len(data.examples) - len(figures)
    hint = f"The first {len(figures)} of {len(data.examples)} pictures." if more > 0 else ""
    return _section("Dataset", hint, f'<div class="pictures">{"".join(figures)}</div>')


def _settings(data: ReportData) -> str:
    settings = {k: v for k, v in data.meta["settings"].items() if v not in (None, "", (), [], {})}
    rows = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td>{escape(_plain(value))}</td></tr>"
        for name, value in sorted(settings.items())
        if name not in ("sample_prompts",)
    )
    return _section("Settings", "", f'<div class="columns"><table>{rows}</table></div>')


def _foot(data: ReportData) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in data.meta["versions"].items())
    device = data.meta["training"].get("device", "")
    return f"<footer>Made with zeroprior on {escape(device)}; {escape(versions)}.</footer>"


# ---- Their parts ---------------------------------------------------------------------------------


def _section(title: str, hint: str, content: str) -> str:
    said = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>"


def _subject(meta: Mapping[str, Any]) -> str:
    return str(meta.get("placeholder_token") or "A LoRA")


def _word(token: Any) -> str:
    return f'<span class="word">{escape(str(token))}</span>'


def _image(image: Image.Image, text: str) -> str:
    """A picture inside the page, as WebP; small ones without loss."""
    small = max(image.size) <= PIXELATED
    encoded = io.BytesIO()
    image.convert("RGB").save(encoded, format="webp", lossless=small, quality=82)
    data = base64.b64encode(encoded.getvalue()).decode()
    style = ' class="pixels"' if small else ""
    return (
        f'<img{style} width="{image.width}" height="{image.height}" alt="{escape(text)}" '
        f'src="data:image/webp;base64,{data}">'
    )


def _plain(value: Any) -> str:
    """A setting's value as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(_plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of the steps, evenly, the first and the last among them."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(k * (len(steps) - 1) / (most - 1))] for k in range(most)]
