"""Renders scenes to images: polygons with Pillow, drawn at four times the size and downsampled.

All lengths are in 64ths of the image's side, so a scene looks the same at every size.
"""

import math
import random
from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

from miniature.world import RADIUS, Scene, Thing

RGB = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

SUPERSAMPLING = 4
OUTLINE: RGB = (40, 35, 48)
OUTLINE_WIDTH = 1.1

COLOUR_RGB: dict[str, RGB] = {
    "red": (222, 42, 42),
    "orange": (246, 140, 30),
    "yellow": (250, 222, 50),
    "green": (40, 160, 70),
    "blue": (45, 90, 225),
    "purple": (130, 50, 172),
    "pink": (247, 135, 190),
    "white": (246, 246, 246),
}
# sky (or wall), ground (or floor), detail
PLACE_RGB: dict[str, tuple[RGB, RGB, RGB]] = {
    "meadow": ((150, 205, 250), (98, 175, 78), (70, 140, 55)),
    "desert": ((252, 218, 165), (226, 176, 98), (200, 148, 75)),
    "sea": ((185, 228, 245), (32, 112, 172), (90, 165, 210)),
    "snow": ((178, 190, 208), (238, 243, 250), (205, 218, 235)),
    "night": ((20, 22, 58), (28, 50, 45), (240, 240, 200)),
    "room": ((228, 208, 184), (142, 96, 60), (110, 70, 42)),
}
NIGHT_STARS = ((6, 8), (17, 4), (26, 12), (37, 5), (46, 11), (57, 6), (11, 19), (53, 20))


def ellipse(x: float, y: float, rx: float, ry: float, count: int = 36) -> Points:
    """An ellipse around (x, y) as a polygon."""
    turns = [2 * math.pi * i / count for i in range(count)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in turns]


def _star() -> Points:
    radii = [1.12 if i % 2 == 0 else 0.5 for i in range(10)]
    return [(r * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5))
            for i, r in enumerate(radii)]  # fmt: skip


def _heart() -> Points:
    points = []
    for i in range(48):
        a = 2 * math.pi * i / 48
        height = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        points.append((1.06 * math.sin(a) ** 3, -height / 15.5))
    return points


# Outlines in units of the thing's radius, y downwards. The ring's hole is cut in `_draw_shape`.
SHAPE_POINTS: dict[str, Points] = {
    "circle": ellipse(0, 0, 0.98, 0.98),
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -1.05), (1.08, 0.85), (-1.08, 0.85)],
    "star": _star(),
    "heart": _heart(),
    "ring": ellipse(0, 0, 1, 1),
}
RING_HOLE = 0.45

# Subjects: layers of (colour, outline), painted in order. "main" is the color that can be changed.
SUBJECT_LAYERS: dict[str, tuple[tuple[str | RGB, Points], ...]] = {
    "bee": (
        ((205, 235, 250), ellipse(-0.35, -0.62, 0.32, 0.5)),
        ((205, 235, 250), ellipse(0.3, -0.62, 0.32, 0.5)),
        ("main", ellipse(0, 0.2, 1.05, 0.62)),
        ((35, 30, 35), [(-0.45, -0.36), (-0.15, -0.42), (-0.15, 0.82), (-0.45, 0.76)]),
        ((35, 30, 35), [(0.15, -0.42), (0.45, -0.36), (0.45, 0.76), (0.15, 0.82)]),
        ((200, 40, 40), ellipse(0.75, 0.1, 0.16, 0.16)),
    ),
    "mushroom": (
        ((245, 228, 195), [(-0.4, 0), (0.4, 0), (0.5, 1.05), (-0.5, 1.05)]),
        ("main", [(-1.1, 0.2), *[(1.1 * math.cos(math.pi * (1 + i / 16)),
                                  0.2 + 1.2 * math.sin(math.pi * (1 + i / 16)))
                                 for i in range(1, 16)], (1.1, 0.2)]),
        ((90, 220, 235), ellipse(-0.5, -0.25, 0.24, 0.24)),
        ((90, 220, 235), ellipse(0.42, -0.4, 0.27, 0.27)),
        ((35, 30, 35), ellipse(-0.18, 0.55, 0.12, 0.16)),
        ((35, 30, 35), ellipse(0.18, 0.55, 0.12, 0.16)),
    ),
    "robot": (
        ((250, 140, 30), [(-0.1, -1.1), (0.1, -1.1), (0.1, -0.6), (-0.1, -0.6)]),
        ((250, 140, 30), ellipse(0, -1.0, 0.2, 0.2)),
        ("main", [(-0.9, -0.6), (0.9, -0.6), (0.9, 0.95), (-0.9, 0.95)]),
        ((250, 245, 190), ellipse(-0.4, -0.05, 0.28, 0.28)),
        ((250, 245, 190), ellipse(0.4, -0.05, 0.28, 0.28)),
        ((35, 30, 35), [(-0.55, 0.45), (0.55, 0.45), (0.55, 0.68), (-0.55, 0.68)]),
    ),
    "fish": (
        ((245, 90, 130), [(0.5, 0), (1.15, -0.65), (1.15, 0.65)]),
        ((245, 90, 130), [(-0.3, -0.4), (0.2, -1.0), (0.45, -0.3)]),
        ("main", ellipse(-0.15, 0, 0.95, 0.62)),
        ((250, 240, 120), [(-0.2, -0.61), (0.12, -0.6), (0.12, 0.6), (-0.2, 0.61)]),
        ((250, 250, 250), ellipse(-0.65, -0.12, 0.2, 0.2)),
        ((35, 30, 35), ellipse(-0.68, -0.12, 0.1, 0.1)),
    ),
}  # fmt: skip
SUBJECT_MAIN: dict[str, RGB] = {
    "bee": (250, 205, 40),
    "mushroom": (150, 60, 60),
    "robot": (90, 150, 150),
    "fish": (40, 170, 150),
}


def _jitter(colour: RGB, rng: random.Random, amount: int) -> RGB:
    r, g, b = (max(0, min(255, c + rng.randint(-amount, amount))) for c in colour)
    return (r, g, b)


def _draw_place(draw: ImageDraw.ImageDraw, scene: Scene, unit: float, rng: random.Random) -> None:
    """Draws sky and ground over the whole canvas, with one typical detail per place."""
    sky, ground, detail = (_jitter(c, rng, 6) for c in PLACE_RGB[scene.place])
    horizon = 43 + rng.uniform(-2, 2)
    draw.rectangle((0, 0, 64 * unit, 64 * unit), fill=sky)
    bumps: dict[str, Callable[[float], float]] = {
        "desert": lambda x: 2.5 * math.sin(x / 9 + 1),
        "snow": lambda x: -5 * math.sin(math.pi * x / 64),
    }
    bump = bumps.get(scene.place, lambda x: 0.0)
    line = [(x * unit, (horizon + bump(x)) * unit) for x in range(0, 65, 2)]
    draw.polygon([*line, (64 * unit, 64 * unit), (0, 64 * unit)], fill=ground)

    def stroke(x0: float, y0: float, x1: float, y1: float, width: float) -> None:
        ends = (x0 * unit, y0 * unit, x1 * unit, y1 * unit)
        draw.line(ends, fill=detail, width=round(width * unit))

    if scene.place == "meadow":
        for x in range(4, 64, 8):
            stroke(x, horizon + 9, x + 1.5, horizon + 5, 1.2)
            stroke(x + 4, horizon + 17, x + 5.5, horizon + 13, 1.2)
    elif scene.place == "sea":
        for row, y in enumerate((5, 11, 17)):
            for x in range(-8 + 6 * row, 64, 16):
                stroke(x, horizon + y, x + 8, horizon + y, 1.2)
    elif scene.place == "room":
        for y in (0, 7, 15):
            stroke(0, horizon + y, 64, horizon + y, 1.0)
    elif scene.place == "night":
        for x, y in NIGHT_STARS:
            draw.ellipse([(x - 0.8) * unit, (y - 0.8) * unit, (x + 0.8) * unit, (y + 0.8) * unit],
                         fill=detail)  # fmt: skip


def placed(points: Points, thing: Thing, unit: float) -> list[tuple[float, float]]:
    """Points in units of the thing's radius, as pixels of a canvas of `unit` pixels per 64th."""
    radius, a = RADIUS[thing.size], math.radians(thing.angle)
    cos, sin = math.cos(a) * radius, math.sin(a) * radius
    return [((thing.x + px * cos - py * sin) * unit, (thing.y + px * sin + py * cos) * unit)
            for px, py in points]  # fmt: skip


def _outlined(draw: ImageDraw.ImageDraw, points: list[tuple[float, float]], unit: float) -> None:
    draw.line([*points, points[0], points[1]], fill=OUTLINE, joint="curve",
              width=round(OUTLINE_WIDTH * unit))  # fmt: skip


def _draw_shape(canvas: Image.Image, thing: Thing, unit: float, rng: random.Random) -> None:
    """Draws a shape: a texture masked by the outline, aligned to the shape's center."""
    colour = _jitter(COLOUR_RGB[thing.colour], rng, 8)
    outline = placed(SHAPE_POINTS[thing.shape], thing, unit)
    hole = placed(ellipse(0, 0, RING_HOLE, RING_HOLE), thing, unit)
    reach = 1.2 * RADIUS[thing.size]
    left, top = int((thing.x - reach) * unit), int((thing.y - reach) * unit)
    side = int(2 * reach * unit) + 1

    paint = Image.new("RGB", (side, side), colour)
    brush = ImageDraw.Draw(paint)
    middle = side / 2
    if thing.texture == "striped":
        dark: RGB = (colour[0] // 3, colour[1] // 3, colour[2] // 3)
        for i in range(-8, 9):
            x = middle + i * 6.5 * unit
            brush.line((x - side, middle + side, x + side, middle - side), fill=dark,
                       width=round(2.1 * unit))  # fmt: skip
    elif thing.texture == "dotted":
        light: RGB = (250, 250, 250) if thing.colour != "white" else (120, 120, 130)
        for row in range(-5, 6):
            for column in range(-5, 6):
                x = middle + (column + row % 2 / 2) * 5.6 * unit
                y, r = middle + row * 4.9 * unit, 1.35 * unit
                brush.ellipse((x - r, y - r, x + r, y + r), fill=light)

    mask = Image.new("L", (side, side), 0)
    cutter = ImageDraw.Draw(mask)
    cutter.polygon([(x - left, y - top) for x, y in outline], fill=255)
    if thing.shape == "ring":
        cutter.polygon([(x - left, y - top) for x, y in hole], fill=0)
    canvas.paste(paint, (left, top), mask)
    draw = ImageDraw.Draw(canvas)
    _outlined(draw, outline, unit)
    if thing.shape == "ring":
        _outlined(draw, hole, unit)


def _draw_subject(canvas: Image.Image, thing: Thing, unit: float, rng: random.Random) -> None:
    main = COLOUR_RGB[thing.colour] if thing.colour else SUBJECT_MAIN[thing.shape]
    draw = ImageDraw.Draw(canvas)
    for colour, points in SUBJECT_LAYERS[thing.shape]:
        where = placed(points, thing, unit)
        fill = main if isinstance(colour, str) else colour
        draw.polygon(where, fill=_jitter(fill, rng, 5))
        _outlined(draw, where, unit)


def render(scene: Scene, pixels: int = 64) -> Image.Image:
    """Renders the scene as an RGB image of `pixels` x `pixels`; deterministic."""
    unit = pixels * SUPERSAMPLING / 64
    side = pixels * SUPERSAMPLING
    rng = random.Random(f"looks {scene.seed}")
    canvas = Image.new("RGB", (side, side))
    _draw_place(ImageDraw.Draw(canvas), scene, unit, rng)
    for thing in scene.things:
        (_draw_subject if thing.is_subject else _draw_shape)(canvas, thing, unit, rng)
    return canvas.resize((pixels, pixels), Image.Resampling.BOX)


def grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size side by side on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def collage(seed: int, pixels: int = 64) -> Image.Image:
    """Random outlined polygons and ellipses in any color, on the background of a scene.

    Training images for the autoencoder, so that it can also encode images unlike the dataset.
    """
    rng = random.Random(f"collage {seed}")
    unit = pixels * SUPERSAMPLING / 64
    canvas = Image.new("RGB", (pixels * SUPERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    _draw_place(draw, Scene(rng.choice(list(PLACE_RGB)), (), "", seed), unit, rng)
    for _ in range(rng.randint(2, 9)):
        x, y = rng.uniform(4, 60), rng.uniform(8, 56)
        reach = rng.choice((2.5, 4, 7, 11))
        if rng.random() < 0.5:
            points = ellipse(x, y, reach * rng.uniform(0.5, 1), reach * rng.uniform(0.5, 1))
        else:
            turns = sorted(rng.uniform(0, 2 * math.pi) for _ in range(rng.randint(3, 6)))
            points = [(x + reach * math.cos(a), y + reach * math.sin(a)) for a in turns]
        pixels_of = [(px * unit, py * unit) for px, py in points]
        fill = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        draw.polygon(pixels_of, fill=fill)
        if rng.random() < 0.7:
            _outlined(draw, pixels_of, unit)
    return canvas.resize((pixels, pixels), Image.Resampling.BOX)


def cutout(
    subject: str, size: str, angle: float, colour: str, pixels: int, scale: float = 1.0
) -> Image.Image:
    """A subject on a transparent background, RGBA, in the middle of `pixels` x `pixels`.

    One pixel is one 64th, as in an image of 64 pixels; `scale` changes the subject's size.
    """
    unit = SUPERSAMPLING * scale
    side = pixels * SUPERSAMPLING
    thing = Thing(subject, colour, "", size, side / 2 / unit, side / 2 / unit, angle)
    canvas = Image.new("RGBA", (side, side))
    _draw_subject(canvas, thing, unit, random.Random(0))
    return canvas.resize((pixels, pixels), Image.Resampling.BOX)
