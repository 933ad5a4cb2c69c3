"""Prompts whose images the miniature's judge can read."""

import itertools
import random
from dataclasses import dataclass

from miniature.lexicon import COLOURS
from miniature.world import Scene, describe, sample_scene, subject_scene

FIRST_SCENE = 900_000  # of the subject's new scenes; datasets count from 0
FIRST_SEED = 50_000  # of their noise
FIRST_EVALUATION = 1_000_000  # scene of the world's evaluation prompts


@dataclass(frozen=True)
class Prompt:
    """A prompt, what its image must show, and the seed of its noise."""

    text: str
    asked: dict[str, str]  # in the terms of `miniature.world.attributes`
    seed: int
    scene: Scene  # one that it describes
    colour: str = ""  # of a recoloured subject


def subject_prompts(subject: str, word: str, count: int) -> list[Prompt]:
    """New scenes of a subject: half alone, a quarter in a new colour, a quarter in company."""
    prompts = []
    for i in range(count):
        colour = list(COLOURS)[i // 4 % len(COLOURS)] if i % 4 == 1 else ""
        scene = subject_scene(subject, FIRST_SCENE + i, word, colour, company=i % 4 == 3)
        caption = describe(scene, random.Random(f"retention {i}"), full=True)
        prompts.append(Prompt(caption.text, caption.asked, FIRST_SEED + i, scene, colour))
    return prompts


def free_prompts(count: int) -> list[Prompt]:
    """Prompts without a subject, of combinations that pre-training never saw.

    Those of `miniature.world.evaluation_prompts`.
    """
    return [_free_prompt(number) for number in range(count)]


def class_prompts(word: str, count: int) -> list[Prompt]:
    """The first prompts without a subject that ask for a single thing of the shape `word`."""
    prompts = (_free_prompt(number) for number in itertools.count())
    return list(
        itertools.islice((each for each in prompts if each.asked.get("shape") == word), count)
    )


def _free_prompt(number: int) -> Prompt:
    first = FIRST_EVALUATION + number
    scene = sample_scene(first, "eval")
    caption = describe(scene, random.Random(f"prompt {first}"), full=True)
    return Prompt(caption.text, caption.asked, number, scene)
