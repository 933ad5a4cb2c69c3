"""Plots as small files."""

import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image


def save_plot(figure: Figure, path: Path) -> None:
    """A PNG of few colours, so that it stays small."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)
