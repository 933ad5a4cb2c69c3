"""The contact sheet: one image that shows several in labelled rows and columns."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from adapters.files.atomic import atomic_file

CELL = 256  # pixels, longest side of an image on the sheet
GAP = 16  # pixels between images and around them
MARGIN = 92  # pixels, for the rows' labels
LINE = 19  # pixels from one line of a label to the next
LINES = 3  # in a column's label; longer ones are truncated
INK, GREY, PAPER = "#1d2430", "#697386", "#ffffff"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def thumbnail(image: Image.Image, edge: int = CELL) -> Image.Image:
    """A copy whose longest side has at most `edge` pixels."""
    small = image.convert("RGB")
    small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    return small


def make_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]
) -> Image.Image:
    """Arranges rows of (label, images) on one image, with column labels above."""
    font, strong = ImageFont.load_default(14), ImageFont.load_default(16)
    cells = [(label, [_cell(each) for each in images]) for label, images in rows]
    width = max((each.width for _, images in cells for each in images), default=CELL)
    heights = [max((each.height for each in images), default=0) for _, images in cells]
    labels = [_wrapped(text, font, width) for text in columns]
    head = GAP + LINE * max(map(len, labels), default=0)
    across = MARGIN + len(columns) * (width + GAP)
    sheet = Image.new("RGB", (across, head + sum(each + GAP for each in heights) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)

    for column, lines in enumerate(labels):
        for number, line in enumerate(lines):
            at = (MARGIN + column * (width + GAP), GAP // 2 + number * LINE)
            pen.text(at, line, fill=GREY, font=font)
    top = head + GAP // 2
    for (label, images), height in zip(cells, heights, strict=True):
        pen.text((MARGIN - GAP, top + height / 2), label, fill=INK, font=strong, anchor="rm")
        for column, image in enumerate(images):
            sheet.paste(image, (MARGIN + column * (width + GAP), top))
        top += height + GAP
    return sheet


def save_png(image: Image.Image, path: Path) -> Path:
    """Writes the image atomically, so a viewer never reads a partial file."""
    with atomic_file(path) as file:
        image.save(file, format="png")
    return path


def _cell(image: Image.Image) -> Image.Image:
    """The image at the sheet's size; small images are scaled without interpolation."""
    small = thumbnail(image)
    return ImageOps.scale(small, max(1, CELL // max(small.size)), Image.Resampling.NEAREST)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """Wraps the text to at most `LINES` lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"{lines[LINES - 1]} …"]
    for number, line in enumerate(lines):
        while len(line) > 2 and font.getlength(line) > width:
            line = f"{line.removesuffix('…')[:-1]}…"
        lines[number] = line
    return lines
