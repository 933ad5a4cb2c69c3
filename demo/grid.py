"""An image grid: rows of captioned cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL = 192  # pixels, edge of an image
GAP = 16  # pixels between cells and around them
LINE = 18  # pixels from one line of text to the next
TITLE_SIZE, CAPTION_SIZE = 20, 13  # pixels
INK, GREY, PAPER = "#222222", "#666666", "#ffffff"


@dataclass(frozen=True)
class Row:
    """A titled row of (image, caption) cells."""

    title: str
    cells: Sequence[tuple[Image.Image, str]]


def draw_grid(rows: Sequence[Row]) -> Image.Image:
    """Draws the rows from top to bottom; images are cropped to squares, captions are below."""
    title_font = ImageFont.load_default(TITLE_SIZE)
    caption_font = ImageFont.load_default(CAPTION_SIZE)
    wrapped = [[_wrapped(text, caption_font) for _, text in row.cells] for row in rows]
    heights = [TITLE_SIZE + GAP + CELL + LINE * max(map(len, lines)) + 2 * GAP for lines in wrapped]
    columns = max(len(row.cells) for row in rows)
    canvas = Image.new("RGB", (columns * (CELL + GAP) + GAP, sum(heights) + GAP), PAPER)
    pen = ImageDraw.Draw(canvas)

    top = GAP
    for row, captions, height in zip(rows, wrapped, heights, strict=True):
        pen.text((GAP, top), row.title, fill=INK, font=title_font)
        for column, ((image, _), lines) in enumerate(zip(row.cells, captions, strict=True)):
            left, below = GAP + column * (CELL + GAP), top + TITLE_SIZE + GAP
            canvas.paste(_square(image), (left, below))
            for number, line in enumerate(lines):
                at = (left, below + CELL + GAP // 2 + number * LINE)
                pen.text(at, line, fill=GREY, font=caption_font)
        top += height
    return canvas


def _square(image: Image.Image) -> Image.Image:
    """The centre crop in the size of a cell; small images are enlarged without smoothing."""
    small = max(image.size) < CELL
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return ImageOps.fit(image.convert("RGB"), (CELL, CELL), how)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """The text in lines no wider than a cell."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
