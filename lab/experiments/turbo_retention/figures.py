"""The plots and the image grid of docs/turbo.md."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from demo.grid import Row as GridRow
from demo.grid import draw_grid
from lab.experiments.plots import save_plot
from lab.experiments.table import Row
from lab.experiments.turbo_retention.curves import PLOTTED
from lab.experiments.turbo_retention.design import CONDITIONS, EIGHT, FEW, TURBO, WORD
from lab.experiments.turbo_retention.results import Curve, Results
from lab.experiments.turbo_retention.study import MERGED, picture_name

PLAN = "curve"
COLOURS = {"adapter": "#0b6e4f", "direct": "#c1121f", "undistilled": "#3a5a9b"}
GREY = "#555555"
LEVELS = (("untouched turbo", TURBO, "-"), ("turbo + adapter", MERGED, ":"))

SHOWN_SEED, SUBJECT_PICTURE, FREE_PICTURE = 0, 0, 1  # of the grid; images count from 0
PIXELS = 64  # edge of an image of the miniature


def draw_curves(results: Results, path: Path) -> None:
    """Six measures over the steps of training, with their intervals."""
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, curve in zip(axes.flat, PLOTTED, strict=True):
        _draw_panel(axis, results, curve)
    for axis in axes[1]:
        axis.set_xlabel("steps of training")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    save_plot(figure, path)


def _draw_panel(axis: Axes, results: Results, curve: Curve) -> None:
    steps = results.steps(PLAN)
    for condition in CONDITIONS:
        found = [results.estimate(curve, condition.name, PLAN, step) for step in steps]
        colour = COLOURS[condition.name]
        means = [each.mean for each in found]
        axis.plot(steps, means, marker="o", markersize=4, color=colour, label=condition.title)
        lows, highs = [each.low for each in found], [each.high for each in found]
        axis.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)
    if curve.way is not None:
        for label, base, style in LEVELS:
            level = results.level(curve, base)
            axis.axhline(level, color=GREY, linewidth=1, linestyle=style, label=label)
    axis.set_title(curve.title, fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_pictures(results: Results, folder: Path, path: Path) -> None:
    """One prompt with the subject in 8 steps and one without it in 2, along every training."""
    shown = (
        ("subject", EIGHT.name, SUBJECT_PICTURE, f"a prompt with {WORD}, 8 steps"),
        ("free", FEW.name, FREE_PICTURE, "a prompt of the world alone, 2 steps"),
    )
    rows = []
    for kind, way, number, what in shown:
        for condition in CONDITIONS:
            point: Row = {"plan": PLAN, "seed": SHOWN_SEED, "base": TURBO, "way": way, "kind": kind}
            points = [point | {"condition": "untouched", "plan": "", "seed": 0, "step": 0}]
            for step in results.steps(PLAN):
                points.append(point | {"condition": condition.name, "step": step})
            cells = [
                (_picture(folder, each, number), f"{each['step']} steps of training")
                for each in points
            ]
            rows.append(GridRow(f"{condition.title}: {what}", cells))
    draw_grid(rows).quantize(128).save(path, optimize=True)


def _picture(folder: Path, point: Row, number: int) -> Image.Image:
    with Image.open(folder / "pictures" / picture_name(point)) as strip:
        left = number * PIXELS
        return strip.convert("RGB").crop((left, 0, left + PIXELS, PIXELS))
