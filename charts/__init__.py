"""Line charts as SVG: inline, with the colours of the page's style sheet, or as a file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

WIDTH, HEIGHT = 500, 270  # of the SVG, in its units; about pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 60, 12, 30  # margins for the labels
TITLE = 34  # height of a chart's title in a file
LABEL_GAP = 15  # between the labels at the ends of the lines
MAX_POINTS = 400  # per line; longer lines are averaged


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y), its CSS class, and a label at its end."""

    points: Sequence[tuple[float, float]]
    style: str
    label: str = ""
    dots: bool = False  # marks every point, with its values as a tooltip


def chart(
    lines: Sequence[Line],
    x_name: str,
    title: str,
    percent: bool = False,
    mark: tuple[float, str] | None = None,
) -> Markup:
    """Renders the lines on common axes as SVG; lines without points are omitted.

    `title` is for screen readers. With `percent` the values are shown with a percent sign. `mark`
    is an x with a label, for a vertical line.
    """
    shown = [line for line in lines if line.points]
    if not shown:
        return Markup()
    xs = [x for line in shown for x, _ in line.points]
    ys = [y for line in shown for _, y in line.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 6), ticks(min(ys), max(ys), 5)
    low, high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    start, end = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - start) / (end - start) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high - y) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    curves = []
    for line in shown:
        placed = [place(x, y) for x, y in line.points]
        values = [f"{x:,.0f}: {_number(y, percent, 4)}" for x, y in line.points if line.dots]
        curves.append((line, placed, list(zip(placed, values, strict=False))))
    labelled = [(place(*line.points[-1])[1], line) for line in shown if line.label]
    ends = _apart([down for down, _ in labelled])
    return Markup(
        _TEMPLATES.get_template("chart.svg").render(
            **{"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT},
            **{"bottom": HEIGHT - BOTTOM + 18, "title": title, "x_name": x_name},
            rows=[(place(start, y)[1], y == 0 and low < 0, _number(y, percent)) for y in y_ticks],
            columns=[(place(x, low)[0], f"{x:,.0f}") for x in x_ticks if start <= x <= end],
            curves=curves,
            mark=None if mark is None else (place(mark[0], low)[0], mark[1]),
            top=TOP,
            names=[(down, line) for down, (_, line) in zip(ends, labelled, strict=True)],
        )
    )


def file_of(charts: Sequence[tuple[str, Markup]]) -> str:
    """An SVG file with titled charts below each other."""
    shown = [(title, chart) for title, chart in charts if chart]
    return _TEMPLATES.get_template("file.svg").render(
        charts=shown, width=WIDTH, height=HEIGHT, row=HEIGHT + TITLE
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """About `about` round numbers (1, 2 or 5 times a power of ten) that enclose the range."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(power * k for k in (1, 2, 5, 10) if span / (power * k) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def smoothed(values: Sequence[float], window: float) -> list[float]:
    """Exponential moving average over about `window` values, without bias towards the start.

    The bias is corrected as in Adam (Kingma and Ba 2014, arXiv 1412.6980, section 3).
    """
    keep, total, weight, means = 1 - 1 / max(1.0, window), 0.0, 0.0, []
    for value in values:
        total = keep * total + (1 - keep) * value if keep else value
        weight = keep * weight + (1 - keep) if keep else 1.0
        means.append(total / weight)
    return means


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points, each the mean of its neighbours."""
    size = -(-len(points) // MAX_POINTS)
    if size <= 1:
        return list(points)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk))
        for chunk in chunks
    ]


def _apart(heights: Sequence[float]) -> list[float]:
    """Moves heights until they are at least `LABEL_GAP` apart and inside the chart."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for before, after in zip(order, order[1:], strict=False):
        moved[after] = max(moved[after], moved[before] + LABEL_GAP)
    over = max(moved, default=0.0) - (HEIGHT - BOTTOM)
    if over > 0:
        moved[order[-1]] -= over
        for after, before in zip(reversed(order), reversed(order[:-1]), strict=False):
            moved[before] = min(moved[before], moved[after] - LABEL_GAP)
    return moved


def _number(value: float, percent: bool, digits: int = 3) -> str:
    text = f"{value:+.{digits}g} %" if percent and value else f"{value:.{digits}g}"
    return text.replace("-", "\u2212")
