"""The miniature's world as the study's ground, with a judge that can count."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.archive import Archive
from adapters.placeholder import Placeholder
from lab.experiments import measures
from lab.experiments.drawing import Drawer, Way
from lab.experiments.prompts import Prompt, class_prompts, free_prompts, subject_prompts
from lab.experiments.training import Recipe, train
from lab.experiments.zero_prior.captions import make_captions
from lab.experiments.zero_prior.design import (
    BASE,
    CLASS_WORDS,
    CONDITIONS,
    PLACEHOLDER,
    Condition,
    Size,
)
from lab.experiments.zero_prior.study import UNTRAINED, Run, run_name
from miniature.drawing import render
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

log = logging.getLogger(__name__)

REPEATS_SEED = 70_000  # of the first image of one prompt generated many times


class World:
    """Subjects that the miniature has never seen."""

    conditions: Sequence[Condition] = CONDITIONS

    def __init__(self, size: Size) -> None:
        self.size = size
        self.drawer = Drawer(BASE)
        self.way = Way("own", size.steps or self.drawer.family.base.inference_steps)
        self.free = free_prompts(size.free_prompts)
        untrained = Placeholder.create(PLACEHOLDER, self.drawer.family.text_width, 1e-5, seed=0)
        self.blank = Archive({}, (untrained.detached(),), {})
        self.untouched = self.drawer.draw(self.blank, self.free, self.way)

    def train(self, run: Run) -> Archive:
        recipe = dict(run.point.recipe)
        if recipe.get("start") == "class":
            recipe["start"] = CLASS_WORDS[run.subject]
        word = run.condition.word_for(CLASS_WORDS[run.subject])
        with tempfile.TemporaryDirectory() as folder:
            dataset = Path(folder) / run.subject
            settings = resolve(
                TrainingInputs(
                    dataset=make_captions(run.subject, run.seed, word, dataset),
                    base_model=BASE,
                    placeholder_token=PLACEHOLDER,
                    train_placeholder_token=run.condition.zero_prior,
                    seed=run.seed,
                    **{
                        "steps": self.drawer.family.base.training_steps.most,
                        "caption_dropout": 0.05,
                        "learning_rate": 4e-3,
                        "placeholder_learning_rate": 0.02,
                    }
                    | run.point.settings,
                )
            )
            (done,) = train(Recipe(settings, **recipe), (settings.steps,))
        log.info("%s: %.2f steps/s", run_name(run.key), done.steps_per_second)
        return done.archive

    def measure(
        self, run: Run, archive: Archive | None
    ) -> tuple[list[Image.Image], dict[str, Any]]:
        word, size = run.condition.word_for(CLASS_WORDS[run.subject]), self.size
        archive = archive or self.blank
        prompts = subject_prompts(run.subject, word, size.subject_prompts)
        pictures = self.drawer.draw(archive, prompts, self.way)
        scores: dict[str, Any] = dict(measures.adherence(pictures, prompts))
        scores["likeness"] = measures.subject_scores(pictures, prompts, run.subject)
        scores["sharpness"] = measures.sharpness(pictures)
        scores |= measures.tones(pictures)
        alone = [not p.colour and len(p.scene.things) == 1 for p in prompts]
        scores["looks"] = [
            look for look, own in zip(measures.looks(pictures), alone, strict=True) if own
        ]
        if run.point is UNTRAINED:  # what the judge reads where there is nothing but the subject
            rendered = [render(p.scene) for p, own in zip(prompts, alone, strict=True) if own]
            scores["rendered_looks"] = measures.looks(rendered)

        free = self.drawer.draw(archive, self.free, self.way)
        scores |= {f"free_{k}": v for k, v in measures.adherence(free, self.free).items()}
        scores |= {f"free_{k}": v for k, v in measures.drift(free, self.untouched).items()}

        classes = class_prompts(CLASS_WORDS[run.subject], size.class_prompts)
        drawn = self.drawer.draw(archive, classes, self.way)
        scores |= {f"class_{k}": v for k, v in measures.adherence(drawn, classes).items()}
        scores["class_likeness"] = measures.subject_scores(drawn, classes, run.subject)

        repeats = [
            Prompt(f"a picture of a {word}", {}, REPEATS_SEED + i, prompts[0].scene)
            for i in range(size.repeats)
        ]
        repeated = self.drawer.draw(archive, repeats, self.way)
        scores["repeats_looks"] = measures.looks(repeated)
        scores["diversity"] = measures.diversity(repeated)
        if archive.placeholder is not None and run.condition.zero_prior:
            scores["placeholder_norm"] = archive.placeholder.norm()
        return pictures, scores
