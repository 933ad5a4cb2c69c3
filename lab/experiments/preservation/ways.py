"""The ways to leave other prompts as they are that are compared.

none     only the training images
flow     the usual loss on images that the base model generated
match    on those images, the base model's velocity
path     the same on the way of generation, at the noisy latents and sigmas of its steps
"""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Way:
    """One way to preserve, and how strong."""

    name: str
    kind: str = "none"  # none, flow, match, path
    weight: float = 0.0
    rows: int = 4  # beside a batch
    prompts: int = 128
    own: bool = False  # trajectories of the model in training, with the training adapter
    without_adapter: bool = False  # the rows are answered by the model that generates
    mix: float = 0.0  # of the rows: training images under other prompts
    project: bool = False  # the subject's gradient keeps off the preservation's
    penalty: float = 0.0  # on the LoRA's output where the base works on other prompts
    every: int = 1
    swapped: float = 0.0  # share of the prompts: the dataset's captions with another noun
    plain: float = 0.0  # share of the prompts: no colour is named
    steps: float = 1.0  # as many times the usual steps
    scales: tuple[float, ...] = ()  # of the LoRA at generation, measured, too
    generated_in: tuple[int, ...] = ()  # steps at generation, measured, too
    begins: float = 0.0  # share of the steps before the first row
    early: bool = False  # rows of other prompts from the first step
    anchors: int = 0  # prompts of the subject that are held as the model has them then
    companions: int = 0  # of the anchors: the subject beside something
    anchored: float = 0.0  # share of the rows that hold them
    anchor_scale: float = 1.0  # of the LoRA that generates the anchors
    anchor_guidance: float = 0.0  # counted from 0, of the model that generates the anchors
    guided: float = 0.0  # of the model's own guidance, added to the target of the loss
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def changes_the_loop(self) -> bool:
        """Whether the trainer's own loop does not do it."""
        return self.kind != "none" or self.penalty > 0 or self.guided > 0


# The ways of rows without a training: the model without a LoRA, and renderings of the scenes.
BASE, RENDERED = "base", "renderings"
M, P = "match", "path"
OLD: dict[str, Any] = {"caption_dropout": 0.05}  # the default before preservation
SLOWER: dict[str, Any] = {"learning_rate": 4e-3, "placeholder_learning_rate": 0.02}  # as it was
FASTER: dict[str, Any] = {"learning_rate": 6e-3, "placeholder_learning_rate": 0.05}
DOUBLE: dict[str, Any] = {"learning_rate": 8e-3, "placeholder_learning_rate": 0.1}


def anchored(name: str, **changed: Any) -> Way:
    """Rows from 0.3 of the steps, a quarter of them anchors."""
    usual: dict[str, Any] = {"weight": 0.5, "own": True, "begins": 0.3, "anchors": 48,
                             "anchored": 0.25, "settings": FASTER}  # fmt: skip
    return Way(name, P, **usual | changed)


def from_start(name: str, weight: float = 0.2, **changed: Any) -> Way:
    """Rows from the first step, none of them anchors."""
    usual: dict[str, Any] = {"rows": 3, "own": True, "settings": FASTER}
    return Way(name, P, weight, **usual | changed)


LOSS_FORMS = [
    Way("as it was", settings=OLD),
    Way("shift 1", settings={"training_shift": 1.0}),
    Way("schedule", settings={"timestep_sampling": "shift"}),
    Way("uniform", settings={"timestep_sampling": "uniform"}),
    Way("guided .5", guided=0.5),
    Way("no adapter", settings={"turbo_adapter": "none"}),
    Way("no adapter, path own .3", P, 0.3, own=True, settings={"turbo_adapter": "none"}),
]
SCREENED = [
    Way("nothing, dropout", settings=OLD),
    Way("path free .3, dropout", P, 0.3, without_adapter=True, settings=OLD),
    Way("match .3, dropout", M, 0.3, settings=OLD),
    Way("nothing"),
    Way("path free .3", P, 0.3, without_adapter=True),
    Way("match .1", M, 0.1),
    Way("path own .1", P, 0.1, own=True),
    Way("match .3 swapped", M, 0.3, swapped=0.5),
    Way("path own .3 swapped", P, 0.3, own=True, swapped=0.5),
    Way("path own .3", P, 0.3, own=True, scales=(1.15, 1.3)),
    Way("path own .1 plain", P, 0.1, own=True, plain=1.0, scales=(1.15,)),
    Way("path own .3 plain", P, 0.3, own=True, plain=1.0, scales=(1.15,)),
    Way("path own .3 half plain", P, 0.3, own=True, plain=0.5, scales=(1.15,)),
    Way("path own .3 project", P, 0.3, own=True, project=True, scales=(1.15,)),
    Way("path own .1 rate 6e-3", P, 0.1, own=True, settings={"learning_rate": 6e-3}),
    Way(
        "path own .1 token rate",
        P,
        0.1,
        own=True,
        settings={"placeholder_learning_rate": 0.05},
    ),
    Way("path own .1 attention", P, 0.1, own=True, settings={"lora_targets": "attention"}),
    Way(
        "path own .1 feed-forward",
        P,
        0.1,
        own=True,
        settings={"lora_targets": "feed_forward"},
    ),
    Way("path own .1 rank 16", P, 0.1, own=True, settings={"rank": 16}),
    Way("path own .1 2 rows 650 steps", P, 0.1, rows=2, own=True, steps=1.3),
    Way("path own .2 every 2 650 steps", P, 0.2, every=2, own=True, steps=1.3),
    Way("nothing attention", settings={"lora_targets": "attention"}),
    Way("penalty .1", penalty=0.1),
    Way("penalty 1", penalty=1.0),
    Way("mix .1", M, 0.1, mix=0.5),
    Way("flow .1", "flow", 0.1),
    Way("match free .1", M, 0.1, without_adapter=True),
    Way("path own .3 half plain, rates", P, 0.3, own=True, plain=0.5, settings=FASTER),
    Way("path own .3, rates", P, 0.3, own=True, settings=FASTER),
    Way("nothing, rates", settings=FASTER),
    Way("path own .2 half plain, rates", P, 0.2, own=True, plain=0.5, settings=FASTER),
    Way("path own .3, double rates", P, 0.3, own=True, settings=DOUBLE),
    Way(
        "path own .3, token rate .1",
        P,
        0.3,
        own=True,
        settings=FASTER | {"placeholder_learning_rate": 0.1},
    ),
    Way("path own .1, rates", P, 0.1, own=True, settings=FASTER),
    Way("path own .3 2 rows, rates", P, 0.3, rows=2, own=True, settings=FASTER),
    from_start("from the start .3", 0.3, scales=(1.1, 1.2)),
    from_start("from the start .2", scales=(1.1, 1.2)),
    from_start("from the start .15", 0.15),
    from_start(
        "from the start .2, rate 7e-3",
        settings={"learning_rate": 7e-3, "placeholder_learning_rate": 0.1},
    ),
    Way(
        "path own .5 half plain 3 rows, rates", P, 0.5, rows=3, own=True, plain=0.5, settings=FASTER
    ),
    from_start(
        "from the start .3, schedule",
        0.3,
        scales=(1.1,),
        settings=FASTER | {"timestep_sampling": "shift"},
    ),
    from_start(
        "from the start .3, shift 1", 0.3, scales=(1.1,), settings=FASTER | {"training_shift": 1.0}
    ),
    from_start(
        "from the start .3, all layers",
        0.3,
        scales=(1.1,),
        settings=FASTER | {"lora_targets": "all"},
    ),
    Way("begins .4, 3 rows, rates", P, 0.2, rows=3, own=True, begins=0.4, settings=FASTER),
    anchored("anchors .4, 4 rows, rates", weight=0.2, begins=0.4),
    anchored("anchors .3, 4 rows, rates", weight=0.3, anchored=0.5),
    anchored("early anchors .3, 4 rows, rates", weight=0.2, early=True),
    anchored(
        "early anchors .2, 3 rows, rates", weight=0.2, rows=3, early=True, begins=0.2, anchored=0.34
    ),
    anchored("anchors .5, 4 rows, rates", weight=0.2, begins=0.5),
    anchored("anchors .3 weight 1, 4 rows, rates", weight=1.0),
    anchored("early anchors .3 weight .5, 4 rows, rates", early=True),
    anchored("anchors .3 weight .5"),
    anchored("anchors .3 weight .5, scale .8", anchor_scale=0.8),
    anchored("anchors .3 weight .5, guided .5", anchor_guidance=0.5),
    anchored("anchors .2 weight .5, companions", begins=0.2, companions=24),
    anchored("anchors .3 weight .5, companions", companions=24),
    anchored("anchors .2 weight .5", begins=0.2),
    anchored("anchors .2 weight .5, scale .8", begins=0.2, anchor_scale=0.8),
    anchored("anchors .3 weight .5, scale .6", anchor_scale=0.6),
    anchored("anchors .3 weight .5, 3 rows", rows=3, anchored=0.34),
    *(replace(way, generated_in=(2, 4)) for way in LOSS_FORMS),
]
NOTHING = Way("nothing", settings=OLD)  # the trainer before preservation
PRESERVE = Way("preserve", settings=FASTER | {"preserve": "auto"})  # the trainer's
STUDIED = [
    NOTHING,
    PRESERVE,
    from_start("from the start", scales=(1.1,)),
    Way("nothing, rates", settings=FASTER),
    Way("match .3, rates", M, 0.3, settings=FASTER),
]
UNDISTILLED_BASE = "miniature"
UNDISTILLED = [NOTHING, PRESERVE]
