"""The plot and the image grid of docs/preservation.md."""

from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from demo.grid import Row, draw_grid
from lab.experiments.plots import save_plot
from lab.experiments.preservation.measures import SHOWN
from lab.experiments.preservation.report import (
    FORMS,
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
    points = {
        row["way"]: (OTHERS.of(row), LIKENESS.of(row), row["way"].startswith("nothing"))
        for row in screen.find(subject="robot")
        if row["way"] not in (*REFERENCES, *FORMS) and not row["way"].endswith(GENERATED_IN)
    }
    best: list[str] = []  # the ways of the frontier, which are numbered
    for way, (x, y, nothing) in sorted(points.items(), key=lambda point: point[1]):
        colour = COLOURS[NOTHING.name] if nothing else "#3a5a9b"
        left.plot(x, y, "o", color=colour, markersize=5)
        if not any(others >= x and likeness > y for others, likeness, _ in points.values()):
            best.append(way)
            left.annotate(
                str(len(best)), (x, y), fontsize=8, xytext=(4, 4), textcoords="offset points"
            )
    listed = "\n".join(f"{number}  {way}" for number, way in enumerate(best, start=1))
    left.text(0.02, 0.03, listed, transform=left.transAxes, fontsize=8)
    left.set_title("every way that was tried: robot, seed 1", fontsize=10)
    left.set_ylabel("likeness to the subject")
    for way in results.complete(TURBO):
        likeness, others = results.ratio(LIKENESS, TURBO, way), results.mean(OTHERS, TURBO, way)
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
    right.set_ylim(90, 101)
    right.set_ylabel("likeness, % of that without preservation")
    right.legend(fontsize=8, frameon=False)
    for axis in (left, right):
        axis.set_xlabel("other prompts fully right, %")
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
