"""The ways to leave other prompts as they are that are compared."""

from dataclasses import dataclass, field
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
    settings: dict[str, Any] = field(default_factory=dict)


M, P = "match", "path"
NODROP: dict[str, Any] = {"caption_dropout": 0.0}
WAYS = [
    Way("nothing"),
    Way("path free .3", "path", 0.3, without_adapter=True),
    Way("match .3", M, 0.3),
    Way("nothing no dropout", settings=NODROP),
    Way("path free .3 no dropout", "path", 0.3, without_adapter=True, settings=NODROP),
    Way("match .1 no dropout", M, 0.1, settings=NODROP),
    Way("path own .1 no dropout", "path", 0.1, own=True, settings=NODROP),
    Way("match .3 swapped no dropout", M, 0.3, swapped=0.5, settings=NODROP),
    Way("path own .3 swapped no dropout", "path", 0.3, own=True, swapped=0.5, settings=NODROP),
    Way("path own .3 no dropout", P, 0.3, own=True, scales=(1.15, 1.3), settings=NODROP),
    Way("path own .1 plain no dropout", P, 0.1, own=True, plain=1.0, scales=(1.15,), settings=NODROP),
    Way("path own .3 plain no dropout", P, 0.3, own=True, plain=1.0, scales=(1.15,), settings=NODROP),
    Way("path own .3 half plain no dropout", P, 0.3, own=True, plain=0.5, scales=(1.15,), settings=NODROP),
    Way("path own .3 project no dropout", P, 0.3, own=True, project=True, scales=(1.15,), settings=NODROP),
    Way("path own .1 rate 6e-3 no dropout", P, 0.1, own=True, settings=NODROP | {"learning_rate": 6e-3}),
    Way("path own .1 token rate no dropout", P, 0.1, own=True, settings=NODROP | {"placeholder_learning_rate": 0.05}),
    Way("path own .1 attention no dropout", P, 0.1, own=True, settings=NODROP | {"lora_targets": "attention"}),
    Way("path own .1 feed-forward no dropout", P, 0.1, own=True, settings=NODROP | {"lora_targets": "feed_forward"}),
    Way("path own .1 rank 16 no dropout", P, 0.1, own=True, settings=NODROP | {"rank": 16}),
    Way("path own .1 2 rows 650 steps no dropout", P, 0.1, rows=2, own=True, steps=1.3, settings=NODROP),
    Way("path own .2 every 2 650 steps no dropout", P, 0.2, every=2, own=True, steps=1.3, settings=NODROP),
    Way("nothing attention no dropout", settings=NODROP | {"lora_targets": "attention"}),
    Way("match .3 2 rows no dropout", M, 0.3, rows=2, settings=NODROP),
    Way("match .3 project no dropout", M, 0.3, project=True, settings=NODROP),
    Way("penalty .1 no dropout", penalty=0.1, settings=NODROP),
    Way("match .1 half no dropout", M, 0.1, every=2, settings=NODROP),
    Way("path .1 no dropout", "path", 0.1, settings=NODROP),
    Way("match .03 no dropout", M, 0.03, settings=NODROP),
    Way("match .3 no dropout", M, 0.3, settings=NODROP),
    Way("match .1 rate 6e-3 no dropout", M, 0.1, settings=NODROP | {"learning_rate": 6e-3}),
    Way("mix .1 no dropout", M, 0.1, mix=0.5, settings=NODROP),
    Way("match free .1 no dropout", M, 0.1, without_adapter=True, settings=NODROP),
    Way("flow .1 no dropout", "flow", 0.1, settings=NODROP),
    Way("penalty 1 no dropout", penalty=1.0, settings=NODROP),
    Way("nothing ema no dropout", settings=NODROP | {"ema_decay": 0.98}),
]  # fmt: skip
