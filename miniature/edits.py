"""The editing task of the dataset: a reference image, an instruction, and the image it asks for.

One attribute changes, or an object comes or goes; everything else stays as in the reference. Both
scenes of an edit belong to its split.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from miniature.lexicon import COLOURS, PLACES, POSITIONS, SHAPES, SIZES, TEXTURES
from miniature.world import (
    COLUMN,
    PAIR_COLUMNS,
    Scene,
    Split,
    attributes,
    held_out,
    noun,
    random_thing,
    sample_scene,
)


@dataclass(frozen=True)
class Edit:
    """An edit. `asked` are the attributes of the target that reference and instruction name."""

    kind: str
    reference: Scene
    target: Scene
    instruction: str
    asked: dict[str, str]


def sample_edit(seed: int, split: Split = "train") -> Edit:
    """The edit of a seed; kinds are equally frequent."""
    rng = random.Random(f"edit {split} {seed}")
    kind = rng.choice(list(KINDS))
    while True:
        reference = sample_scene(rng.randrange(10**9), split)
        edit = KINDS[kind](kind, reference, rng)
        if edit is None:
            continue
        flags = {held_out(t.shape, t.colour, t.texture, edit.target.place)
                 for t in edit.target.things}  # fmt: skip
        if flags == {split == "eval"}:
            return edit


def _change(kind: str, scene: Scene, rng: random.Random) -> Edit | None:
    """Another colour, texture, shape or size of one object."""
    number = rng.randrange(len(scene.things))
    thing = scene.things[number]
    values = {"colour": COLOURS, "texture": TEXTURES, "shape": SHAPES, "size": SIZES}[kind]
    allowed = [value for value in values if value != getattr(thing, kind)]
    if len(scene.things) == 2 and kind == "size":
        allowed = [value for value in allowed if value != "large"]
    value = rng.choice(allowed)
    word = rng.choice([name for name in values[value] if name])
    name = _name(scene, number, rng)
    if kind == "shape":
        template = rng.choice(("turn {} into {}", "change {} to {}", "make {} {}"))
        word = ("an " if word[0] in "aeiou" else "a ") + word
    else:
        template = rng.choice(("make {} {}", "turn {} {}"))
    things, changed = list(scene.things), dict[str, Any]({kind: value, "word": ""})
    things[number] = replace(thing, **changed)
    return _edit(kind, scene, replace(scene, things=tuple(things)), template.format(name, word))


def _position(kind: str, scene: Scene, rng: random.Random) -> Edit | None:
    if len(scene.things) == 2:
        return None
    [thing] = scene.things
    value = rng.choice([each for each in POSITIONS if each != scene.position])
    word = rng.choice(
        {"left": ("left",), "middle": ("middle", "centre"), "right": ("right",)}[value]
    )
    instruction = f"{rng.choice(('move', 'put'))} {_name(scene, 0, rng)} to the {word}"
    moved = replace(thing, x=thing.x - COLUMN[scene.position] + COLUMN[value])
    return _edit(kind, scene, replace(scene, things=(moved,), position=value), instruction)


def _place(kind: str, scene: Scene, rng: random.Random) -> Edit | None:
    value = rng.choice([each for each in PLACES if each != scene.place])
    name = _name(scene, 0, rng) if len(scene.things) == 1 else "them"
    instruction = f"{rng.choice(('put', 'show'))} {name} {rng.choice(PLACES[value])}"
    return _edit(kind, scene, replace(scene, place=value), instruction)


def _add(kind: str, scene: Scene, rng: random.Random) -> Edit | None:
    """A second object on the other side; the first stays where it is."""
    if scene.position not in ("left", "right") or scene.things[0].size == "large":
        return None
    side = 1 if scene.position == "left" else 0
    new = random_thing(rng, PAIR_COLUMNS[side], ("small", "medium"))
    named: dict[str, str] = {}
    prefix = ("left.", "right.")[side]
    what = noun(new, prefix, rng, named, full=True)
    where = rng.choice(
        (f"{rng.choice(('next to', 'beside'))} {_name(scene, 0, rng)}",
         ("on the left", "on the right")[side])
    )  # fmt: skip
    pair = (scene.things[0], new) if side else (new, scene.things[0])
    edit = _edit(kind, scene, replace(scene, things=pair, position=""), f"add {what} {where}")
    asked = {key: value for key, value in edit.asked.items()
             if not key.startswith(prefix) or key in named}  # fmt: skip
    return replace(edit, asked=asked)


def _remove(kind: str, scene: Scene, rng: random.Random) -> Edit | None:
    if len(scene.things) == 1:
        return None
    number = rng.randrange(2)
    name = _name(scene, number, rng)
    target = replace(scene, things=(scene.things[1 - number],),
                     position=("right", "left")[number])  # fmt: skip
    return _edit(kind, scene, target, f"{rng.choice(('remove', 'take out'))} {name}")


KINDS: dict[str, Callable[[str, Scene, random.Random], Edit | None]] = {
    **dict.fromkeys(("colour", "texture", "shape", "size"), _change),
    "position": _position,
    "place": _place,
    "add": _add,
    "remove": _remove,
}


def _edit(kind: str, reference: Scene, target: Scene, instruction: str) -> Edit:
    return Edit(kind, reference, target, instruction, attributes(target))


def _name(scene: Scene, number: int, rng: random.Random) -> str:
    """The words for an object in an instruction, which fit no other object of the scene."""
    thing = scene.things[number]
    if len(scene.things) == 1 and rng.random() < 0.5:
        return "it"
    shape = f"the {rng.choice(SHAPES[thing.shape])}"
    if len(scene.things) == 1 or scene.things[0].shape != scene.things[1].shape:
        return shape
    return f"{shape} on the {('left', 'right')[number]}"
