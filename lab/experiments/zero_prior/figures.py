"""The plot and the image grid of docs/zero_prior.md."""

from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from demo.grid import Row, draw_grid
from lab.experiments.plots import save_plot
from lab.experiments.zero_prior.compare import TOLD, Results
from lab.experiments.zero_prior.design import CONDITIONS, POINTS
from lab.experiments.zero_prior.study import UNTRAINED, run_name
from miniature.models import PIXELS

COLOURS = {"class_word": "#3a5a9b", "wrong_prior": "#c1121f", "rare_string": "#b8860b",
           "zero_prior": "#0b6e4f"}  # fmt: skip
SHOWN_PICTURE = 0  # of each run


def draw_metrics(results: Results, path: Path) -> None:
    """One panel per metric: every condition at every point, with its interval."""
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, 4)
    for axis, metric in zip(axes.flat, results.metrics[:TOLD], strict=True):
        for place, point in enumerate(POINTS):
            for number, condition in enumerate(CONDITIONS):
                if not results.table.find(point=point.name, condition=condition.name):
                    continue
                found = results.mean(metric, point.name, condition.name)
                below, above = found.mean - found.low, found.high - found.mean
                axis.errorbar(
                    place + 0.15 * (number - 1.5), found.mean, [[below], [above]],
                    fmt="o", markersize=5, capsize=3, color=COLOURS[condition.name],
                    label=condition.title if place == len(POINTS) - 1 else None,
                )  # fmt: skip
        axis.set_title(metric.title, fontsize=10)
        axis.set_xticks(range(len(POINTS)), [point.name for point in POINTS])
        axis.set_xlim(-0.6, len(POINTS) - 0.4)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save_plot(figure, path)


def draw_choices(results: Results, path: Path) -> None:
    """One panel per metric: what every choice changes of what the defaults give."""
    names = [each.name for each in reversed(results.choices)]
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots(2, 4, sharey=True)
    for axis, metric in zip(axes.flat, results.metrics[:TOLD], strict=True):
        for place, name in enumerate(names):
            found = results.choice(metric, name).mean
            below, above = found.mean - found.low, found.high - found.mean
            axis.errorbar(
                found.mean, place, xerr=[[below], [above]], fmt="o", markersize=4, capsize=3,
                color=COLOURS["zero_prior"],
            )  # fmt: skip
        axis.axvline(0, color="#555555", linewidth=1)
        axis.set_title(metric.title, fontsize=10)
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    save_plot(figure, path)


def draw_pictures(results: Results, folder: Path, path: Path) -> None:
    """The first image of every subject, untrained and at every point, by condition."""
    rows = []
    for point in (UNTRAINED, *POINTS):
        for condition in CONDITIONS:
            found = results.table.find(point=point.name, condition=condition.name)
            first = {row["subject"]: row for row in reversed(found)}
            cells = [
                (_picture(folder / "pictures" / f"{run_name(row)}.png"), subject)
                for subject, row in sorted(first.items())
            ]
            if cells:
                rows.append(Row(f"{point.name}: {condition.title}", cells))
    draw_grid(rows).quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def _picture(path: Path) -> Image.Image:
    with Image.open(path) as strip:
        left = SHOWN_PICTURE * PIXELS
        return strip.convert("RGB").crop((left, 0, left + PIXELS, PIXELS))
