"""What is compared, at which points, and what is tried of the placeholder."""

from dataclasses import dataclass, field, replace
from typing import Any

from miniature.world import SUBJECTS

BASE = "miniature-turbo"
PLACEHOLDER = "<zwx>"
WRONG_PRIOR = "florp"  # a purple dotted star in every caption of pre-training
RARE = "zwx"  # no caption of pre-training has it
SEEDS = (42, 43, 44, 45, 46)


# The world's shape whose outline is nearest.
CLASS_WORDS = {"bee": "circle", "mushroom": "triangle", "robot": "square", "fish": "circle"}


@dataclass(frozen=True)
class Condition:
    """What the subject is called; without a word of its own it is the class word."""

    name: str
    title: str
    word: str = ""

    @property
    def zero_prior(self) -> bool:
        return self.word == PLACEHOLDER

    def word_for(self, class_word: str) -> str:
        """The word in the captions of a subject of this class."""
        return self.word or class_word


ZERO_PRIOR = Condition("zero_prior", "placeholder", PLACEHOLDER)
CONDITIONS = (
    Condition("class_word", "class word"),
    Condition("wrong_prior", "wrong prior", WRONG_PRIOR),
    Condition("rare_string", "rare string", RARE),
    ZERO_PRIOR,
)


@dataclass(frozen=True)
class Point:
    """Hyperparameters that conditions share; what is left out is the base's own."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)  # of `lab.experiments.training.Recipe`


# The published point was one for a model of 20 billion parameters.
PUBLISHED = Point(
    "published",
    {"steps": 200, "learning_rate": 5e-5, "batch_size": 1, "rank": 32, "caption_dropout": 0.1,
     "lr_scheduler": "constant"},
)  # fmt: skip
CONVERGED = Point("converged")
POINTS = (PUBLISHED, CONVERGED)

# What `train` should do with a placeholder: one thing changed at a time, from `converged`.
CHOICES = (
    Point("rate 2e-3", {"placeholder_learning_rate": 2e-3}),
    Point("rate 1e-1", {"placeholder_learning_rate": 1e-1}),
    Point("start 0", {"placeholder_init_std": 0.0}),
    Point("start 1e-3", {"placeholder_init_std": 1e-3}),
    Point("start 1e-2", {"placeholder_init_std": 1e-2}),
    Point("start class word", recipe={"start": "class"}),
    Point("2 vectors", recipe={"vectors": 2}),
    Point("4 vectors", recipe={"vectors": 4}),
    Point("placeholder alone", recipe={"train_lora": False}),
    Point("LoRA alone", recipe={"train_placeholder": False}),
    Point("clipped together", recipe={"clip_together": True}),
)


@dataclass(frozen=True)
class Size:
    """How much is trained and drawn."""

    subjects: tuple[str, ...] = SUBJECTS
    seeds: tuple[int, ...] = SEEDS
    choice_seeds: tuple[int, ...] = SEEDS[:2]
    points: tuple[Point, ...] = POINTS
    choices: tuple[Point, ...] = CHOICES
    subject_prompts: int = 32
    free_prompts: int = 32
    class_prompts: int = 16
    repeats: int = 16  # images of one prompt, for diversity
    steps: int | None = None  # of drawing; None is the base's own
    pixels: int | None = None  # of the side of photographs' images; None is the base's own


_SHORT = {"steps": 1, "batch_size": 1, "resolution": "64"}
SMALL = Size(
    subjects=SUBJECTS[:1],
    seeds=SEEDS[:1],
    choice_seeds=SEEDS[:1],
    points=(replace(CONVERGED, settings=_SHORT),),
    choices=(
        Point("2 vectors", _SHORT, {"vectors": 2, "start": "class"}),
        Point("placeholder alone", _SHORT, {"train_lora": False}),
        Point("rate 2e-3", _SHORT | {"placeholder_learning_rate": 2e-3}),
    ),
    subject_prompts=4,
    free_prompts=2,
    class_prompts=2,
    repeats=2,
    steps=1,
    pixels=64,
)
