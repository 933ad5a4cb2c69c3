"""The plot and the image grid of docs/preservation.md."""

from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from demo.grid import Row, draw_grid
from lab.experiments.plots import save_plot
from lab.experiments.preservation.measures import SHOWN
from lab.experiments.preservation.report import (
    GENERATED_IN,
    LIKENESS,
    OTHERS,
    REFERENCES,
    TURBO,
    Results,
)
from lab.experiments.preservation.ways import BASE, NOTHING, PRESERVE
from lab.experiments.table import Table
from miniature.models import PIXELS
from miniature.world import SUBJECTS

COLOURS = {NOTHING.name: "#c1121f", PRESERVE.name: "#0b6e4f"}
# Images of the strip that are shown: with the subject alone, in another colour, beside something,
# and of prompts without it.
CELLS = {"alone": 0, "another colour": 1, "beside a thing": 3, "without it": SHOWN,
         "without it ": SHOWN + 3, "without it  ": SHOWN + 4}  # fmt: skip


def draw_frontier(results: Results, screen: Table, path: Path) -> None:
    """Likeness against other prompts fully right: every way on one subject, and the study."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in screen.rows:
        if (
            row["way"] in REFERENCES
            or row["way"].endswith(GENERATED_IN)
            or row["subject"] != "robot"
        ):
            continue
        plain = row["way"].startswith("nothing")
        colour = COLOURS[NOTHING.name] if plain else "#3a5a9b"
        left.plot(OTHERS.of(row), LIKENESS.of(row), "o", color=colour, markersize=5)
        left.annotate(
            row["way"], (OTHERS.of(row), LIKENESS.of(row)), fontsize=5, xytext=(3, 3),
            textcoords="offset points",
        )  # fmt: skip
    left.set_title("every way that was tried: robot, seed 1", fontsize=10)
    for way in results.ways(TURBO):
        likeness, others = (results.mean(each, TURBO, way) for each in (LIKENESS, OTHERS))
        right.errorbar(
            others.mean, likeness.mean,
            [[likeness.mean - likeness.low], [likeness.high - likeness.mean]],
            [[others.mean - others.low], [others.high - others.mean]],
            fmt="o", capsize=3, label=way, color=COLOURS.get(way),
        )  # fmt: skip
    right.axvline(
        results.reference(OTHERS, TURBO, BASE), color="#555555", linewidth=1, label="base model"
    )
    right.set_title("the study", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.set_xlabel("other prompts fully right, %")
        axis.set_ylabel("likeness to the subject")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    save_plot(figure, path)


def draw_pictures(folder: Path, path: Path) -> None:
    """The same prompts and noise without and with preservation, for every subject."""
    rows = []
    for subject in SUBJECTS:
        for way in (NOTHING, PRESERVE):
            strip = folder / f"{way.name}-{TURBO}-{subject}-1.png"
            if strip.exists():
                cells = [(_cell(strip, place), title.strip()) for title, place in CELLS.items()]
                rows.append(Row(f"{subject}: {way.name}", cells))
    draw_grid(rows).quantize(256, Image.Quantize.FASTOCTREE).save(path, optimize=True)


def _cell(strip: Path, place: int) -> Image.Image:
    row, column = divmod(place, SHOWN)
    with Image.open(strip) as image:
        left, top = column * PIXELS, row * PIXELS
        return image.convert("RGB").crop((left, top, left + PIXELS, top + PIXELS))
