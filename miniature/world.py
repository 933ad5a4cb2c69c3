"""The dataset of simple shapes: random scenes by seed, their attributes and captions.

A scene has a place and one object, or two next to each other. An object (`Thing`) is a shape with
color, texture and size, or one of the subjects that are not in the pre-training data. `drawing.py`
renders scenes.

The two splits are disjoint: `train` excludes one in eight of the (shape, colour, texture, place)
combinations, and `eval` has only those; their seeds are different streams.
"""

import random
import zlib
from dataclasses import dataclass, replace
from typing import Literal

from miniature.lexicon import (
    COLOURS,
    OPENINGS,
    PLACES,
    POSITIONS,
    PRIOR_WORDS,
    SHAPES,
    SIZES,
    TEXTURES,
)

Split = Literal["train", "eval"]

RADIUS = {"small": 8.5, "medium": 12.0, "large": 15.5}  # in 64ths of the image's side
COLUMN = {"left": 17.0, "middle": 32.0, "right": 47.0}  # centre of a single thing
PAIR_COLUMNS = (17.5, 46.5)
SUBJECTS = ("bee", "mushroom", "robot", "fish")  # not in the pre-training data
PLACEHOLDER = "TOK"  # the subject in the captions of its dataset

PAIR_SHARE = 0.2  # scenes with two objects
PRIOR_SHARE = 0.06  # single objects named by one of PRIOR_WORDS
SAID = {"colour": 0.95, "size": 0.85, "position": 0.85, "place": 0.95}  # chance to be mentioned


@dataclass(frozen=True)
class Thing:
    """One object. Lengths in 64ths of the image's side, the angle in degrees."""

    shape: str  # a key of SHAPES, or one of SUBJECTS
    colour: str  # a key of COLOURS; "" is a subject's default
    texture: str
    size: str
    x: float
    y: float
    angle: float
    word: str = ""  # the word of PRIOR_WORDS or the placeholder that names it in captions

    @property
    def is_subject(self) -> bool:
        return self.shape in SUBJECTS


@dataclass(frozen=True)
class Scene:
    """The content of an image. `things` are ordered from left to right; `seed` is for details."""

    place: str
    things: tuple[Thing, ...]
    position: str  # the column of a single object, "" for two
    seed: int


@dataclass(frozen=True)
class Caption:
    """A caption and the attributes that it names, as in `attributes`."""

    text: str
    asked: dict[str, str]


def held_out(shape: str, colour: str, texture: str, place: str) -> bool:
    """Whether this combination belongs to the `eval` split (one in eight)."""
    return zlib.crc32(f"{shape} {colour} {texture} {place}".encode()) % 8 == 0


def random_thing(rng: random.Random, x: float, sizes: tuple[str, ...]) -> Thing:
    return Thing(
        shape=rng.choice(list(SHAPES)),
        colour=rng.choice(list(COLOURS)),
        texture=rng.choice(("plain", "plain", "striped", "dotted")),
        size=rng.choice(sizes),
        x=x + rng.uniform(-2.5, 2.5),
        y=34 + rng.uniform(-3, 3),
        angle=rng.uniform(-12, 12),
    )


def sample_scene(seed: int, split: Split = "train") -> Scene:
    """The scene of a seed."""
    rng = random.Random(f"{split} {seed}")
    pair = rng.random() < PAIR_SHARE
    while True:
        place = rng.choice(list(PLACES))
        if pair:
            position = ""
            things = tuple(random_thing(rng, x, ("small", "medium")) for x in PAIR_COLUMNS)
        else:
            position = rng.choice(list(POSITIONS))
            thing = random_thing(rng, COLUMN[position], tuple(SIZES))
            if rng.random() < PRIOR_SHARE:
                word = rng.choice(list(PRIOR_WORDS))
                shape, colour, texture = PRIOR_WORDS[word]
                thing = replace(thing, shape=shape, colour=colour, texture=texture, word=word)
            things = (thing,)
        flags = [held_out(t.shape, t.colour, t.texture, place) for t in things]
        if (not any(flags)) if split == "train" else all(flags):
            return Scene(place, things, position, seed)


def attributes(scene: Scene) -> dict[str, str]:
    """The attributes of a scene: `count`, `place`, and shape, colour, texture, size of each object.

    The keys of a single object have no prefix, and it also has a `position`; the keys of two
    objects have the prefixes `left.` and `right.`. A subject has no texture, and a color only if it
    is not the default.
    """
    shown = {"count": str(len(scene.things)), "place": scene.place}
    if scene.position:
        shown["position"] = scene.position
    for side, thing in zip(_sides(scene), scene.things, strict=True):
        shown |= {f"{side}shape": thing.shape, f"{side}size": thing.size}
        if thing.colour:
            shown[f"{side}colour"] = thing.colour
        if not thing.is_subject:
            shown[f"{side}texture"] = thing.texture
    return shown


def _sides(scene: Scene) -> tuple[str, ...]:
    return ("",) if len(scene.things) == 1 else ("left.", "right.")


def noun(thing: Thing, side: str, rng: random.Random, asked: dict[str, str], full: bool) -> str:
    """A noun phrase such as `a small striped red star`; adds its attributes to `asked`."""
    says = {k: full or rng.random() < p for k, p in SAID.items()}
    words = []
    size = rng.choice(SIZES[thing.size]) if says["size"] else ""
    if size:
        words.append(size)
        asked[f"{side}size"] = thing.size
    if thing.word:  # the word alone implies the appearance
        colour = rng.choice(COLOURS[thing.colour]) if thing.is_subject and thing.colour else ""
        words += [colour, thing.word]
    else:
        texture = rng.choice(TEXTURES[thing.texture])
        colour = rng.choice(COLOURS[thing.colour]) if says["colour"] else ""
        pair = [texture, colour] if rng.random() < 0.5 else [colour, texture]
        words += [*pair, rng.choice(SHAPES[thing.shape])]
    if not thing.is_subject:
        asked[f"{side}shape"] = thing.shape
        asked[f"{side}texture"] = thing.texture
    if thing.colour and (thing.word or says["colour"]):
        asked[f"{side}colour"] = thing.colour
    noun = " ".join(word for word in words if word)
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def describe(scene: Scene, rng: random.Random, full: bool = False) -> Caption:
    """A caption of the scene; with `full` it names all attributes but a medium size."""
    asked = {"count": str(len(scene.things))}
    nouns = [noun(thing, side, rng, asked, full)
             for side, thing in zip(_sides(scene), scene.things, strict=True)]  # fmt: skip
    if len(nouns) == 2:
        left, right = nouns
        body = rng.choice(
            (f"{left} next to {right}", f"{left} and {right}", f"{left} beside {right}",
             f"{left} on the left and {right} on the right")
        )  # fmt: skip
    else:
        body = nouns[0]
        if full or rng.random() < SAID["position"]:
            body += " " + rng.choice(POSITIONS[scene.position])
            asked["position"] = scene.position
    opening = rng.choice(OPENINGS)
    if full or rng.random() < SAID["place"]:
        asked["place"] = scene.place
        place = rng.choice(PLACES[scene.place])
        if not opening and rng.random() < 0.3:
            return Caption(f"{place}, {body}", asked)
        body += " " + place
    return Caption(f"{opening} {body}".strip(), asked)


def caption(scene: Scene, rng: random.Random) -> str:
    """The text of `describe`."""
    return describe(scene, rng).text


def subject_scene(
    subject: str,
    seed: int,
    word: str = PLACEHOLDER,
    colour: str = "",
    place: str | None = None,
    company: bool | None = None,
) -> Scene:
    """A scene with a subject, alone or next to another object (`company`; one in four)."""
    if subject not in SUBJECTS:
        raise ValueError(f"unknown subject {subject!r}; use one of {', '.join(SUBJECTS)}")
    rng = random.Random(f"subject {subject} {seed}")
    drawn_place = rng.choice(list(PLACES))
    drawn_company = rng.random() < 0.25
    company = drawn_company if company is None else company
    position = rng.choice(list(POSITIONS))
    # Small subjects lose details at 64 pixels, so they are medium or large.
    base = random_thing(rng, PAIR_COLUMNS[0] if company else COLUMN[position],
                  ("medium",) if company else ("medium", "large"))  # fmt: skip
    things = [replace(base, shape=subject, colour=colour, texture="", word=word)]
    if company:
        things.append(random_thing(rng, PAIR_COLUMNS[1], ("small", "medium")))
    return Scene(place or drawn_place, tuple(things), "" if company else position, seed)


def subject_dataset(
    subject: str, count: int = 16, seed: int = 0, word: str = PLACEHOLDER
) -> list[tuple[Scene, str]]:
    """`count` scenes of a subject in various places, with captions that name it `word`."""
    scenes = [subject_scene(subject, 1000 * seed + i, word) for i in range(count)]
    return [(s, caption(s, random.Random(f"subject {s.seed}"))) for s in scenes]


def evaluation_prompts(count: int, seed: int = 0) -> list[Caption]:
    """Prompts of the `eval` split that name all attributes, with these attributes."""
    first = 1_000_000 * (seed + 1)
    return [
        describe(sample_scene(first + i, "eval"), random.Random(f"prompt {first + i}"), full=True)
        for i in range(count)
    ]
