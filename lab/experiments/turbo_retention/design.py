"""What is trained, when it is measured, and how images are generated."""

from dataclasses import dataclass, replace

from lab.experiments.drawing import Way

WORD = "<zwx>"  # the placeholder that is trained
TURBO, UNDISTILLED = "miniature-turbo", "miniature"
SEEDS = (0, 1, 2)  # of training runs


@dataclass(frozen=True)
class Condition:
    """One way to train."""

    name: str
    title: str
    base: str
    turbo_adapter: str


CONDITIONS = (
    Condition("adapter", "turbo with the adapter", TURBO, "auto"),
    Condition("direct", "turbo without the adapter", TURBO, "none"),
    Condition("undistilled", "undistilled base", UNDISTILLED, "auto"),
)


@dataclass(frozen=True)
class Plan:
    """One length and schedule of training, and the steps after which it is measured.

    What is None is the base's own.
    """

    name: str
    milestones: tuple[int, ...]
    lr_scheduler: str | None = None
    learning_rate: float | None = None  # of the LoRA
    batch_size: int | None = None


# `curve` is trained as people train Turbo: one image at a time, at a constant rate that is low
# for the model. At the miniature's own 4e-3 and batches of 8, what any LoRA makes the base forget
# hides what becomes of the distillation. `default` is a plain `train` with nothing said.
PLANS = (
    Plan("curve", (50, 100, 200, 400, 800, 1600), "constant", learning_rate=1e-3, batch_size=1),
    Plan("default", (500,)),
)

FEW = Way("2 steps", 2)
EIGHT = Way("8 steps", 8)
MANY = Way("30 steps, guided", 30, guidance=1.0, share=1 / 6)
# Of finished training runs: whether a lower LoRA scale changes the base model less.
WEAKER = tuple(Way(f"8 steps, LoRA at {scale}", 8, scale=scale) for scale in (0.75, 0.5))


@dataclass(frozen=True)
class Size:
    """How much is trained and drawn."""

    subject_prompts: int = 48
    free_prompts: int = 48
    plans: tuple[Plan, ...] = PLANS
    seeds: tuple[int, ...] = SEEDS
    ways: tuple[Way, ...] = (FEW, EIGHT, MANY)
    weaker: tuple[Way, ...] = WEAKER


# To see that everything works: seconds, by fewer steps of drawing under the same names.
SMALL = Size(
    subject_prompts=2,
    free_prompts=2,
    plans=(Plan("curve", (1,), "constant", batch_size=1), Plan("default", (1,))),
    seeds=(0,),
    ways=tuple(replace(way, steps=1, share=1.0) for way in (FEW, EIGHT, MANY)),
    weaker=tuple(replace(way, steps=1) for way in WEAKER),
)
