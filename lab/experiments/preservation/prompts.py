"""The prompts of the compared ways: without the subject, and of the subject in new places."""

import itertools
import random
import re
from collections.abc import Sequence

from lab.experiments.preservation.ways import Way
from miniature.lexicon import COLOURS, SHAPES, TEXTURES
from miniature.world import caption, sample_scene

TOKEN = "<zwx>"


def other_prompts(way: Way, captions: Sequence[str]) -> list[str]:
    """Those that a way preserves."""
    swaps = swapped_prompts(captions, int(way.swapped * way.prompts))
    prompts = varied_prompts(way.prompts - len(swaps)) + swaps
    return [plain(p) if n < way.plain * way.prompts else p for n, p in enumerate(prompts)]


def varied_prompts(count: int) -> list[str]:
    """Captions of scenes that pre-training may have seen; never those that are measured."""
    return [caption(sample_scene(200_000 + n, "train"), random.Random(f"keep {n}"))
            for n in range(count)]  # fmt: skip


def swapped_prompts(captions: Sequence[str], count: int) -> list[str]:
    """The dataset's captions with a shape in the place of the token, at times coloured."""
    found = []
    for n in range(count):
        r = random.Random(f"swap {n}")
        noun = r.choice(list(SHAPES.values()))[0]
        if r.random() < 0.5:
            noun = f"{r.choice(list(COLOURS.values()))[0]} {noun}"
        found.append(captions[n % len(captions)].replace(TOKEN, noun))
    return found


def plain(prompt: str) -> str:
    """A prompt without its colours."""
    words = "|".join(sorted((w for each in COLOURS.values() for w in each), key=len, reverse=True))
    text = re.sub(rf"\b(?:{words})\b ?", "", prompt)
    return articles(text)


def anchor_prompts(count: int, companions: int = 0) -> list[str]:
    """Prompts of the subject in colours and places that its images do not show.

    In the last `companions` of them something is beside it.
    """
    shapes = "|".join(word for each in SHAPES.values() for word in each)
    textures = "|".join(word for each in TEXTURES.values() for word in each if word)
    of_subject = rf"(?:\b(?:{textures}) )?((?:\w+ )?)\b(?:{shapes})\b"
    found: dict[int, list[str]] = {1: [], 2: []}
    wanted = {1: count - companions, 2: companions}
    for number in itertools.count():
        if all(len(found[things]) == wanted[things] for things in found):
            return found[1] + found[2]
        scene = sample_scene(300_000 + number, "train")
        things = len(scene.things)
        if len(found[things]) < wanted[things] and not any(each.word for each in scene.things):
            text = caption(scene, random.Random(f"anchor {number}"))
            nouns = list(re.finditer(of_subject, text))
            if len(nouns) == things:
                noun = nouns[number % things]
                named = f"{text[: noun.start()]}{noun[1]}{TOKEN}{text[noun.end() :]}"
                found[things].append(articles(named))
    raise AssertionError


def articles(text: str) -> str:
    """The text with a and an as the next word wants them."""
    return re.sub(r"\ba(n?) (?=[aeiou])", "an ", re.sub(r"\ban (?=[^aeiou])", "a ", text))
