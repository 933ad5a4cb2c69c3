"""python -m lab.benchmarks.growth: time and memory by images, rank, resolution, batch and LoRAs.

`images` prepares datasets for the miniature, each in a separate process. The other parts use the
small base of `lab.benchmarks.training_step`: whole steps beside the frozen base at the same shape,
and LoRAs laid over it together. All times are of the processor, on one thread, so that other
programs do not count.
"""

import argparse
import itertools
import re
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from adapters.archive import Archive, write_archive
from adapters.cache import AdapterCache
from adapters.formats.deltas import Deltas
from adapters.formats.layout import Layout
from adapters.lora import Lora
from adapters.merging import LoraMerger
from families.family import Family
from lab.benchmarks.machine import machine
from lab.benchmarks.preparation import (
    MEMORY,
    TIME,
    Row,
    alone_and_quiet,
    images,
    in_a_process,
    plain_settings,
    seconds,
)
from lab.benchmarks.soak import memory
from lab.benchmarks.training_step import RANK, SIZES, Size, Step, Ways, kept_bytes
from trainer.learning.features import Captions
from trainer.learning.loop import Loop
from trainer.learning.loss import flow_loss


@dataclass(frozen=True)
class Shape:
    """The shape of a training step."""

    rank: int = RANK
    side: int = 16  # of the image, in tokens
    batch: int = 1


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    size: Size
    rounds: int
    pictures: Sequence[int]
    axes: Mapping[str, Mapping[int, Shape]]  # from value to shape
    loras: Sequence[int]  # at once


FULL = Plan(
    SIZES["small"],
    7,
    (10, 100, 1_000, 10_000),
    {
        "rank": {rank: Shape(rank=rank) for rank in (4, 8, 16, 32, 64, 128, 256)},
        "resolution": {side**2: Shape(side=side) for side in (8, 16, 24, 32)},
        "batch": {batch: Shape(batch=batch) for batch in (1, 2, 4, 8)},
    },
    (1, 2, 4, 8, 16),
)
QUICK = Plan(
    SIZES["miniature"],
    2,
    (10, 20),
    {
        "rank": {rank: Shape(rank=rank, side=8) for rank in (4, 64)},
        "resolution": {side**2: Shape(side=side) for side in (4, 8)},
        "batch": {batch: Shape(batch=batch, side=8) for batch in (1, 2)},
    },
    (1, 2),
)
VALUES = {"rank": "rank", "resolution": "tokens of picture", "batch": "batch"}  # titles


# ---- Rank, resolution, batch ---------------------------------------------------------------------


class Shapes(Ways):
    """Steps of other shapes than the one that `lab.benchmarks.training_step` measures."""

    def latents(self, shape: Shape) -> torch.Tensor:
        """Random latents_BCHW."""
        channels, rows, _ = self.sample.mean_CHW.shape
        edge = shape.side * rows // self.size.image_rows
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape.batch, channels, edge, edge, generator=generator)

    def frozen_base(self, shape: Shape) -> Step:
        """The floor: the frozen base, forward and backward to its latents."""
        family, latents = self.family(), self.latents(shape).requires_grad_()
        noise, sigma = torch.ones_like(latents), torch.full((shape.batch,), 0.5)

        def step() -> None:
            latents.grad = None
            flow_loss(family, latents, noise, sigma, [self.text] * shape.batch).backward()

        return step

    def training(self, shape: Shape) -> Loop:
        """A training run with kept text, whose whole step is measured."""
        family, mean = self.family(), self.latents(shape)[0]
        sample = replace(self.sample, caption=self.words, mean_CHW=mean, std_CHW=mean * 0)
        settings = plain_settings("unread.zip", self.folder, shape.rank, shape.batch)
        captions = Captions(family, [self.words])
        lora = Lora(family.transformer, family.lora_targets(), shape.rank, 0)
        return Loop(family, settings, [sample], captions, lora, ())


def training_steps(axis: str, plan: Plan, folder: Path) -> list[Row]:
    """A training step for each value along one axis, and the floor at its shape.

    All take turns; ratios are medians of those within a round.
    """
    along, shapes = plan.axes[axis], Shapes(plan.size, folder / "base")
    loops = {shape: shapes.training(shape) for shape in along.values()}
    work: dict[Shape, Step] = {shape: partial(_next_step, loop) for shape, loop in loops.items()}
    floor_of = {shape: replace(shape, rank=0) for shape in loops}  # ranks have one in common
    work |= {floor: shapes.frozen_base(floor) for floor in dict.fromkeys(floor_of.values())}
    for step in work.values():
        step()
    taken = turns(work, plan.rounds)
    kept = {shape: kept_bytes(step, shapes.frozen) for shape, step in work.items()}
    rows: list[Row] = []
    for value, shape in along.items():
        floor, first, loop = floor_of[shape], next(iter(along.values())), loops[shape]
        rows.append(
            {
                VALUES[axis]: value,
                "floor, ms": 1e3 * statistics.median(taken[floor]),
                "step, ms": 1e3 * statistics.median(taken[shape]),
                "step to floor": ratio(taken[shape], taken[floor]),
                "step to the first": ratio(taken[shape], taken[first]),
                "kept, MB": kept[shape] / 1e6,
                "kept to floor": kept[shape] / kept[floor],
                # masters, gradients and AdamW's two moments
                "LoRA, MB": 16 * sum(each.numel() for each in loop.parameters) / 1e6,
            }
        )
    return rows


def _next_step(loop: Loop) -> None:
    loop.step(loop.done)


# ---- LoRAs ---------------------------------------------------------------------------------------

BOUND = 4  # LoRAs that one of the caches may keep


@torch.no_grad()
def loras(plan: Plan, folder: Path) -> list[Row]:
    """The cost of merging so many LoRAs at once, generating with them and keeping them."""
    shapes = Shapes(plan.size, folder / "base")
    family = shapes.family()
    files = write_loras(family, max(plan.loras) + 1, folder)
    size, kept, bounded = in_a_process(holding, plan, files)

    merger, deltas = LoraMerger(family.transformer), fitted(family, AdapterCache(), files)
    step = partial(shapes.loss, family, shapes.sample.mean_CHW[None])
    merger.apply([(deltas[0], 1.0)])  # takes copies of the pristine weights
    copies = sum(family.transformer.get_submodule(name).weight.nbytes for name in deltas[0])
    changes: dict[int, list[float]] = {count: [] for count in plan.loras}
    steps: dict[int, list[float]] = {count: [] for count in (0, *plan.loras)}
    for _ in range(plan.rounds):
        merger.restore()
        steps[0].append(seconds(step))
        for count in plan.loras:
            for chosen in (deltas[:count], deltas[1 : count + 1]):  # no layer's stay as they were
                change = partial(merger.apply, [(each, 1 / count) for each in chosen])
                changes[count].append(seconds(change))
            steps[count].append(seconds(step))
    return [
        {
            "LoRAs": count,
            "change of all, ms": 1e3 * statistics.median(changes[count]),
            "change to the first": ratio(changes[count], changes[plan.loras[0]]),
            "step to none": ratio(steps[count], steps[0]),
            "factors, MB": count * size,
            "kept, MB": kept[count],
            f"kept, bound of {BOUND}, MB": bounded[count],
            "copies of the base, MB": copies / 1e6,
        }
        for count in plan.loras
    ]


def holding(plan: Plan, files: Sequence[Path]) -> tuple[float, dict[int, float], dict[int, float]]:
    """MB of one LoRA's factors, as counted; and resident once so many were read, in a cache that
    has room for all and in a bounded one."""
    (one := AdapterCache()).get(files[0])
    cache, bounded = AdapterCache(), AdapterCache(BOUND * one.size)
    all_, few = (reading(each, files, plan.loras) for each in (cache, bounded))
    return one.size / 1e6, all_, few


def fitted(family: Family, cache: AdapterCache, files: Sequence[Path]) -> list[Deltas]:
    """LoRAs as `inference.engine` reads them and lays them over."""
    layout = Layout.of(family.transformer, family.base.name)
    return [cache.fit(cache.get(file), layout) for file in files]


def write_loras(family: Family, count: int, folder: Path) -> list[Path]:
    """Random LoRAs on every layer that a training run adapts."""
    files = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        factors = {}
        for name in family.lora_targets():
            rows, columns = family.transformer.get_submodule(name).weight.shape
            down = torch.randn(RANK, columns, generator=draw) / columns**0.5
            factors[name] = down, torch.randn(rows, RANK, generator=draw) / 100
        meta = {"base_model": family.base.hub_id}
        files.append(write_archive(Archive(factors, (), meta), folder / f"{seed}.zip"))
    return files


def reading(cache: AdapterCache, files: Sequence[Path], counts: Sequence[int]) -> dict[int, float]:
    """MB that are resident more once so many files were read."""
    before, grown = memory(), {}
    for number, file in enumerate(files[: max(counts)], start=1):
        cache.get(file)
        if number in counts:
            grown[number] = (memory() - before) * 2**20 / 1e6
    return grown


# ---- Time, tables, plot --------------------------------------------------------------------------


def turns(work: Mapping[Shape, Step], rounds: int) -> dict[Shape, list[float]]:
    """Seconds of each, round by round."""
    taken: dict[Shape, list[float]] = {shape: [] for shape in work}
    for _ in range(rounds):
        for shape, step in work.items():
            taken[shape].append(seconds(step))
    return taken


def ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """The median ratio within a round."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def table(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Markdown."""
    lines = [list(columns), ["---"] * len(columns)]
    lines += [[shown(row[column]) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(cell: str | float) -> str:
    """Three digits, more before the point."""
    if isinstance(cell, str | int):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


# Of the plot: part, title, x axis, y values, and whether they are relative to the first.
PANELS = (
    ("images", "preparation, s", "pictures", ("together, s",), False),
    ("images", "peak memory, MB", "pictures", ("peak, MB",), False),
    ("rank", "to the frozen base", "rank", ("step to floor", "kept to floor"), False),
    ("resolution", "to 64 tokens", VALUES["resolution"], ("step, ms", "kept, MB"), True),
    ("batch", "to one picture", "batch", ("step, ms", "kept, MB"), True),
    ("loras", "ms to change all of them", "LoRAs", ("change of all, ms",), False),
)


def draw_plot(found: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A panel or two for each part that was measured; axes along which little happens are plain."""
    from matplotlib.figure import Figure  # measuring needs no plots
    from matplotlib.ticker import LogLocator

    from lab.experiments.plots import save_plot

    panels = [panel for panel in PANELS if panel[0] in found]
    columns = min(3, len(panels))
    figure = Figure(figsize=(4 * columns, 3.2 * -(-len(panels) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for axis, (part, title, along, generated, relative) in zip(axes, panels, strict=False):
        kinds = dict.fromkeys(row.get("captions", "") for row in found[part])
        for column, kind in itertools.product(generated, kinds):
            rows = [row for row in found[part] if row.get("captions", "") == kind]
            x, y = ([float(row[name]) for row in rows] for name in (along, column))
            y = [each / y[0] for each in y] if relative else y
            axis.plot(x, y, marker="o", markersize=4, label=kind or column.partition(",")[0])
        if relative:
            axis.plot(x, [each / x[0] for each in x], ":", color="#555555", label="in proportion")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(along)
        axis.set_xscale("log")
        ticks = sorted({float(row[along]) for row in found[part]})
        axis.set_xticks(ticks, [re.sub("000$", "k", f"{each:.0f}") for each in ticks], fontsize=8)
        low, high = axis.get_ylim()
        if high > 3 * low:
            axis.set_yscale("log")
            fine = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)
            axis.yaxis.set_major_locator(LogLocator(subs=fine))
        else:
            axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    save_plot(figure, path)


PARTS: dict[str, Callable[[Plan, Path], list[Row]]] = {
    "images": lambda plan, folder: images(plan.pictures, folder),
    **{axis: partial(training_steps, axis) for axis in VALUES},
    "loras": loras,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmarks.growth", description=__doc__)
    parser.add_argument("--part", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="the miniature, few values and rounds")
    parser.add_argument("--plot", type=Path, help="a PNG of all that was measured")
    given = parser.parse_args()
    alone_and_quiet()
    print(machine(), flush=True)
    found = {}
    for part in given.part:
        with tempfile.TemporaryDirectory() as scratch:
            found[part] = PARTS[part](QUICK if given.quick else FULL, Path(scratch))
        for columns in (TIME, MEMORY) if part == "images" else (list(found[part][0]),):
            print(f"\n{part}:\n\n{table(found[part], columns)}", flush=True)
    if given.plot is not None:
        draw_plot(found, given.plot)


if __name__ == "__main__":
    main()
