"""Ten caption templates, in which the subject's word alone differs between conditions."""

import zlib
from pathlib import Path

from miniature.drawing import render
from miniature.lexicon import COLOURS, PLACES, POSITIONS, SHAPES, SIZES, TEXTURES
from miniature.world import Scene, Thing, subject_scene

PICTURES = 16  # of a dataset, as the demo's
_BEGINNINGS = ("", "a picture of ", "a drawing of ", "an image of ", "there is ")
TEMPLATES = tuple(
    template
    for beginning in _BEGINNINGS
    for template in (f"{beginning}{{what}} {{where}}", f"{{where}}, {beginning}{{what}}")
)


def template_of(subject: str, number: int) -> str:
    """The template of a dataset's image: by its name's hash, so the same in every condition."""
    return TEMPLATES[zlib.crc32(f"{subject}/{number:02d}".encode()) % len(TEMPLATES)]


def caption(scene: Scene, word: str, template: str) -> str:
    """What is to be seen, the subject being called `word`."""
    what = " next to ".join(_noun(thing, word) for thing in scene.things)
    position = f"{POSITIONS[scene.position][0]} " if scene.position else ""
    return template.format(what=what, where=f"{position}{PLACES[scene.place][0]}")


def _noun(thing: Thing, word: str) -> str:
    words = [SIZES[thing.size][0]]
    if thing.is_subject:
        words.append(word)
    else:
        words += [TEXTURES[thing.texture][0], COLOURS[thing.colour][0], SHAPES[thing.shape][0]]
    noun = " ".join(filter(None, words))
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def scenes(subject: str, seed: int) -> list[Scene]:
    """The scenes of a dataset; every seed has its own."""
    return [subject_scene(subject, 1000 * seed + number) for number in range(PICTURES)]


def make_captions(subject: str, seed: int, word: str, folder: Path) -> Path:
    """Writes the dataset, as images with a text file beside each; gives the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, scene in enumerate(scenes(subject, seed)):
        render(scene).save(folder / f"{number:02d}.png")
        text = caption(scene, word, template_of(subject, number))
        (folder / f"{number:02d}.txt").write_text(text + "\n", encoding="utf-8")
    return folder
