"""python -m benchmarks.growth: how time and memory grow with images, rank, resolution, batch, LoRAs.

`images` prepares data sets for the miniature, each in a process of its own. The other parts use the
small base of `benchmarks.training_step`: whole training steps beside the frozen base at the same
shape, and LoRAs laid over it together. All times are of the processor, on one thread, so that other
programs do not count.
"""

import argparse
import io
import itertools
import logging
import re
import statistics
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from adapters.archive import Archive, write_archive
from adapters.cache import AdapterCache
from adapters.layout import Layout
from adapters.lora import Lora
from adapters.overlay import Overlay
from adapters.placeholder import Placeholder
from benchmarks.machine import machine
from benchmarks.soak import memory
from benchmarks.training_step import RANK, RATE, SIZES, Size, Step, Ways, kept_bytes
from families.bases import find_base
from families.family import Family
from families.loading import load_family
from miniature.models import PIXELS, write_random
from trainer.dataset import read_dataset
from trainer.features import Captions, encode_pictures
from trainer.loop import Loop
from trainer.loss import flow_loss
from trainer.members import MAX_MEMBERS
from trainer.settings import Settings, settle

CPU = torch.device("cpu")
Row = dict[str, str | float]  # by the columns' titles


@dataclass(frozen=True)
class Shape:
    """What a training step sees."""

    rank: int = RANK
    side: int = 16  # of the picture, in tokens
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
    5,
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


def plain_settings(dataset: str | Path, base: Path, shape: Shape, **more: Any) -> Settings:
    """Settings under which every step is like the last."""
    return settle(
        dataset=dataset,
        base_model=str(base),
        rank=shape.rank,
        batch_size=shape.batch,
        learning_rate=RATE,
        steps=100_000,
        caption_dropout=0.0,
        seed=0,
        **{"train_placeholder_token": False} | more,
    )


# ---- Images --------------------------------------------------------------------------------------

# The same words for all, which are read once; a file beside each picture; and such files with the
# placeholder, whose features are made in the steps.
SAME, OWN, PLACEHOLDER = "one for all", "each its own", "each its own, with the placeholder"


def images(plan: Plan, folder: Path) -> list[Row]:
    """What it takes to prepare so many pictures, and a step with them."""
    write_random(folder / "base", dtype=torch.float32)
    rows: list[Row] = []
    for captions in (SAME, OWN, PLACEHOLDER):
        first: Row = {}
        for wanted in plan.pictures:
            count = min(wanted, MAX_MEMBERS // (1 if captions == SAME else 2))  # files in a zip
            dataset = write_dataset(folder / "pictures.zip", count, captions)
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row = pool.submit(prepare, dataset, folder / "base", captions).result()
            first = first or row
            more, above = (float(row[x]) - float(first[x]) for x in ("pictures", "peak, MB"))
            row["above the first, kB per picture"] = 1e3 * above / more if more else ""
            rows.append(row)
    return rows


def write_dataset(path: Path, count: int, captions: str) -> Path:
    """Smooth random JPEGs of the miniature's size and, unless it is one for all, their captions."""
    draw = np.random.default_rng(0)
    subject = "TOK" if captions == PLACEHOLDER else "a cat"
    with zipfile.ZipFile(path, "w") as zipped:
        for number in range(count):
            coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
            picture.save(encoded := io.BytesIO(), "JPEG")
            zipped.writestr(f"{number}.jpg", encoded.getvalue())
            if captions != SAME:
                zipped.writestr(f"{number}.txt", f"a photo of {subject} beside number {number}")
    return path


def prepare(dataset: Path, base: Path, captions: str) -> Row:
    """Reads and encodes a data set as `trainer.run` does, then takes a few steps with it."""
    alone_and_quiet()
    settings = plain_settings(
        dataset,
        base,
        Shape(),
        resolution=PIXELS,
        default_caption="a photo of a cat",
        train_placeholder_token=captions == PLACEHOLDER,
    )
    family = load_family(settings.base, CPU, torch.float32)

    at = [time.process_time()]
    examples = read_dataset(settings.dataset, settings.default_caption, settings.subject)
    at.append(time.process_time())
    samples = encode_pictures(family, examples, settings)
    at.append(time.process_time())
    word = None
    if settings.subject is not None:
        word = Placeholder.create(settings.subject, family.text_width, 1e-5, 0)
    vectors = {word.token: word.vectors} if word is not None else {}
    texts = Captions(family, [each.caption for each in samples], vectors)
    at.append(time.process_time())
    peak = peak_memory()

    lora = Lora(family.transformer, family.lora_targets(), RANK, 0)
    loop = Loop(family, settings, samples, texts, lora, word)
    steps = [seconds(partial(loop.step, number)) for number in range(9)]
    count, kept = len(examples), {each.caption for each in examples} - texts.trained
    held = {
        "file": sum(len(each.data) for each in examples),
        "latents": sum(each.mean_CHW.nbytes + each.std_CHW.nbytes for each in samples),
        "text": sum(each.nbytes for each in texts.features(sorted(kept))),
    }
    taken = [after - before for before, after in zip(at, at[1:], strict=False)]
    return {
        "captions": captions,
        "pictures": count,
        **dict(zip(("reading, s", "pictures, s", "captions, s"), taken, strict=True)),
        "together, s": sum(taken),
        "ms per picture": 1e3 * sum(taken) / count,
        "a step then, ms": 1e3 * statistics.median(steps[1:]),  # without what is loaded late
        **{f"{what}, kB per picture": size / count / 1e3 for what, size in held.items()},
        "peak, MB": peak / 1e6,
    }


def peak_memory() -> int:
    """The most bytes that this process has had resident."""
    status = Path("/proc/self/status").read_text()  # getrusage counts the parent's, too
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


# ---- Rank, resolution, batch ---------------------------------------------------------------------


class Shapes(Ways):
    """Steps of other shapes than the one that `benchmarks.training_step` measures."""

    def __init__(self, size: Size, folder: Path) -> None:
        super().__init__(size, folder)
        self.frozen.clear()  # what was loaded to find the words is gone again

    def family(self) -> Family:
        """The base, loaded anew. Its text encoder has no part in a step."""
        family = load_family(find_base(str(self.folder)), CPU, self.size.dtype)
        weights = family.transformer.parameters()
        self.frozen |= {each.untyped_storage().data_ptr() for each in weights}
        return family

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
        """A training with kept text, whose whole step is measured."""
        family, mean = self.family(), self.latents(shape)[0]
        sample = replace(self.sample, caption=self.words, mean_CHW=mean, std_CHW=mean * 0)
        settings = plain_settings("unread.zip", self.folder, shape)
        captions = Captions(family, [self.words])
        lora = Lora(family.transformer, family.lora_targets(), shape.rank, 0)
        return Loop(family, settings, [sample], captions, lora, None)


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
    """What it takes to lay so many LoRAs over the base at once, to draw with them, to keep them."""
    shapes = Shapes(plan.size, folder / "base")
    family = shapes.family()
    files = write_loras(family, max(plan.loras) + 1, folder)
    (one := AdapterCache()).get(files[0])
    bounded, cache = AdapterCache(BOUND * one.size), AdapterCache()
    small, large = (reading(each, files, plan.loras) for each in (bounded, cache))

    layout = Layout.of(family.transformer, family.base.name)
    deltas = [cache.fit(cache.get(file), layout) for file in files]
    overlay = Overlay(family.transformer)
    before = memory()
    overlay.apply([(deltas[0], 1.0)])  # takes copies of the pristine weights
    copies = (memory() - before) * 2**20 / 1e6
    step = partial(shapes.loss, family, shapes.sample.mean_CHW[None])
    changes: dict[int, list[float]] = {count: [] for count in plan.loras}
    steps: dict[int, list[float]] = {count: [] for count in (0, *plan.loras)}
    for _ in range(plan.rounds):
        overlay.restore()
        steps[0].append(seconds(step))
        for count in plan.loras:
            for chosen in (deltas[:count], deltas[1 : count + 1]):  # no layer's stay as they were
                change = partial(overlay.apply, [(each, 1 / count) for each in chosen])
                changes[count].append(seconds(change))
            steps[count].append(seconds(step))
    return [
        {
            "LoRAs": count,
            "change of all, ms": 1e3 * statistics.median(changes[count]),
            "change to the first": ratio(changes[count], changes[plan.loras[0]]),
            "step to none": ratio(steps[count], steps[0]),
            "copies of the base, MB": copies,
            "factors, MB": count * one.size / 1e6,
            "resident, MB": large[count],
            f"resident, bound of {BOUND}, MB": small[count],
        }
        for count in plan.loras
    ]


def write_loras(family: Family, count: int, folder: Path) -> list[Path]:
    """Random LoRAs on every layer that a training adapts."""
    files = []
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        factors = {}
        for name in family.lora_targets():
            rows, columns = family.transformer.get_submodule(name).weight.shape
            down = torch.randn(RANK, columns, generator=draw) / columns**0.5
            factors[name] = down, torch.randn(rows, RANK, generator=draw) / 100
        meta = {"base_model": family.base.hub_id}
        files.append(write_archive(Archive(factors, None, meta), folder / f"{seed}.zip"))
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


def seconds(work: Callable[[], object]) -> float:
    """Of the processor."""
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """The median ratio within a round."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[shown(each) for each in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(cell: str | float) -> str:
    """Three digits, more before the point."""
    if isinstance(cell, str | int):
        return str(cell)
    return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"


# The panels of the plot: part, title, what goes along it, what is drawn, divided by its first or not.
PANELS = (
    ("images", "preparation, s", "pictures", ("together, s",), False),
    ("images", "peak memory, MB", "pictures", ("peak, MB",), False),
    ("rank", "to the frozen base", "rank", ("step to floor", "kept to floor"), False),
    ("resolution", "to 64 tokens", VALUES["resolution"], ("step, ms", "kept, MB"), True),
    ("batch", "to one picture", "batch", ("step, ms", "kept, MB"), True),
    ("loras", "ms to change all of them", "LoRAs", ("change of all, ms",), False),
)


def draw_plot(found: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A panel or two for each part that was measured, both axes logarithmic."""
    from matplotlib.figure import Figure  # measuring needs neither

    from experiments.plots import save_plot

    panels = [panel for panel in PANELS if panel[0] in found]
    columns = min(3, len(panels))
    figure = Figure(figsize=(4 * columns, 3.2 * -(-len(panels) // columns)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat
    for axis, (part, title, along, drawn, relative) in zip(axes, panels, strict=False):
        kinds = dict.fromkeys(row.get("captions", "") for row in found[part])
        for column, kind in itertools.product(drawn, kinds):
            rows = [row for row in found[part] if row.get("captions", "") == kind]
            x, y = ([float(row[name]) for row in rows] for name in (along, column))
            y = [each / y[0] for each in y] if relative else y
            axis.loglog(x, y, marker="o", markersize=4, label=kind or column.partition(",")[0])
        if relative:
            axis.loglog(x, [each / x[0] for each in x], ":", color="#555555", label="in proportion")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(along)
        axis.set_xticks(x, [f"{each:,.0f}" for each in x])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=7, frameon=False)
    save_plot(figure, path)


PARTS: dict[str, Callable[[Plan, Path], list[Row]]] = {
    "images": images,
    **{axis: partial(training_steps, axis) for axis in VALUES},
    "loras": loras,
}


def alone_and_quiet() -> None:
    """One thread, and no lines but the tables."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
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
        print(f"\n{part}:\n\n{table(found[part])}", flush=True)
    if given.plot is not None:
        draw_plot(found, given.plot)


if __name__ == "__main__":
    main()
