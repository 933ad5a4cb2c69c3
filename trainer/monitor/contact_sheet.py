"""The contact sheet: pictures in labelled rows and columns, on one picture."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from adapters.files.atomic import atomic_file

CELL = 256  # pixels, longest side of a picture on the sheet
GAP = 16  # pixels between pictures and around them
MARGIN = 92  # pixels, for the rows' labels
LINE = 19  # pixels from one line of a label to the next
LINES = 3  # of a column's label; longer ones are cut
INK, GREY, PAPER = "#1d2430", "#697386", "#ffffff"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def thumbnail(image: Image.Image, edge: int = CELL) -> Image.Image:
    """A copy with at most `edge` pixels at its longest side."""
    small = image.convert("RGB")
    small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    return small


def draw_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], columns: Sequence[str]
) -> Image.Image:
    """One picture of (label, pictures) rows, with the columns' labels above them."""
    font, strong = ImageFont.load_default(14), ImageFont.load_default(16)
    cells = [(label, [_cell(each) for each in pictures]) for label, pictures in rows]
    width = max((each.width for _, pictures in cells for each in pictures), default=CELL)
    heights = [max((each.height for each in pictures), default=0) for _, pictures in cells]
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
    for (label, pictures), height in zip(cells, heights, strict=True):
        pen.text((MARGIN - GAP, top + height / 2), label, fill=INK, font=strong, anchor="rm")
        for column, picture in enumerate(pictures):
            sheet.paste(picture, (MARGIN + column * (width + GAP), top))
        top += height + GAP
    return sheet


def save_png(image: Image.Image, path: Path) -> Path:
    """Writes the picture all at once: whoever watches the file never sees half of it."""
    with atomic_file(path) as file:
        image.save(file, format="png")
    return path


def _cell(image: Image.Image) -> Image.Image:
    """The picture at the sheet's size; the pixels of a small one stay visible."""
    small = thumbnail(image)
    return ImageOps.scale(small, max(1, CELL // max(small.size)), Image.Resampling.NEAREST)


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """The text in at most `LINES` lines no wider than `width` pixels."""
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
