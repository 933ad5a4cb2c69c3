"""python -m lab.benchmarks.swap: what it costs to change the LoRA, and to generate with one.

The published models' numbers of layers with tiny tensors, so what is measured is the Python around
each layer, which a GPU has to wait for too. Both ways take turns on the same model, LoRA and
machine; medians of processor time on one thread, so that other programs do not count.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters.archive import Archive, read_archive
from adapters.formats.deltas import Delta
from adapters.formats.layout import Layout
from adapters.formats.lora_file import write_lora
from adapters.merging import LoraMerger
from families.registry import FAMILIES
from lab.benchmarks.models import MODELS, PUBLISHED_BLOCKS, block_linears

RANK = 4
PIPELINES = {each.title: getattr(diffusers, each.classes.pipeline) for each in FAMILIES.values()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m lab.benchmarks.swap", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="of the quick measurements")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    print("| model | layers | measured | ours | diffusers | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            for row in measure(name, Path(folder), arguments.repeats):
                print(f"| {' | '.join(row)} |", flush=True)


def measure(name: str, folder: Path, repeats: int) -> list[list[str]]:
    """The rows of one model."""
    transformer = MODELS[name](PUBLISHED_BLOCKS[name])
    targets = block_linears(transformer)
    layout = Layout.of(transformer, name)
    files = [_lora(targets, seed, folder) for seed in range(2)]
    archives = [read_archive(file) for file in files]
    fitted = [layout.fit(archive.deltas, "file") for archive in archives]
    merger = LoraMerger(transformer)
    pipeline = _pipeline(name, transformer)
    states = [load_file(file) for file in files]
    step = _step(name, transformer)

    first = _seconds(lambda: merger.apply([(fitted[1], 1.0)]))  # takes the pristine copies
    swaps: list[float] = []
    again: list[float] = []
    whole: list[float] = []
    loads: list[float] = []
    for n in range(repeats):
        for each in fitted:
            swaps.append(_seconds(partial(merger.apply, [(each, 1.0)])))
            again.append(_seconds(partial(merger.apply, [(each, 1.0)])))
        whole.append(_seconds(partial(_from_file, files[n % 2], layout, merger)))
        merger.restore()
        if n < 3:  # a second each
            loads.append(_seconds(partial(_load_and_unload, pipeline, states[n % 2])))
    bare, merged, wrapped = _steps(step, merger, fitted[0], pipeline, states[0], repeats)

    def row(what: str, ours: list[float], diffusers_: list[float] | None) -> list[str]:
        mine = statistics.median(ours)
        cells = [name, str(len(targets)), what, _shown(mine)]
        if diffusers_ is None:
            return [*cells, "", ""]
        return [*cells, _shown(statistics.median(diffusers_)), f"{_median_ratio(diffusers_, mine)}"]

    merged_ratio, wrapped_ratio = (
        statistics.median(on / off for on, off in zip(each, bare, strict=True))
        for each in (merged, wrapped)
    )
    return [
        row("another LoRA, read before", swaps, loads),
        row("another LoRA, from its file", whole, loads),
        row("the same LoRA again", again, None),
        row("the first LoRA of all", [first], None),
        [
            *(name, str(len(targets)), "a step with a LoRA / without"),
            *(f"{merged_ratio:.3f}", f"{wrapped_ratio:.3f}", ""),
        ],
    ]


def _from_file(file: Path, layout: Layout, merger: LoraMerger) -> None:
    archive: Archive = read_archive(file)
    merger.apply([(layout.fit(archive.deltas, "file"), 1.0)])


def _load_and_unload(pipeline: Any, state: dict[str, Tensor]) -> None:
    pipeline.load_lora_weights(dict(state))
    pipeline.unload_lora_weights()


def _steps(
    step: Callable[[], object],
    merger: LoraMerger,
    deltas: dict[str, Delta],
    pipeline: Any,
    state: dict[str, Tensor],
    repeats: int,
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of a forward pass of the bare base, with a LoRA laid over it, and with PEFT's."""
    bare: list[float] = []
    merged: list[float] = []
    wrapped: list[float] = []
    for _ in range(2):
        step()
    for _ in range(repeats):
        bare.append(_seconds(step))
        merger.apply([(deltas, 1.0)])
        merged.append(_seconds(step))
        merger.restore()
    pipeline.load_lora_weights(dict(state))
    wrapped += [_seconds(step) for _ in range(repeats)]
    pipeline.unload_lora_weights()
    return bare, merged, wrapped


def _step(name: str, transformer: Any) -> Callable[[], object]:
    """A forward pass at 256 tokens of image and 32 of text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 32, 64, generator=generator)
    if name == "Z-Image":
        latents = [torch.randn(16, 1, 32, 32, generator=generator)]
        return lambda: transformer(latents, torch.tensor([0.5]), list(text), return_dict=False)
    tokens = torch.randn(1, 256, 64, generator=generator)
    return lambda: transformer(
        hidden_states=tokens,
        timestep=torch.tensor([0.5]),
        encoder_hidden_states=text,
        img_shapes=[[(1, 16, 16)]],
        return_dict=False,
    )


def _lora(targets: dict[str, nn.Linear], seed: int, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (
            torch.randn(RANK, each.in_features, generator=generator) / 8,
            torch.randn(each.out_features, RANK, generator=generator) / 8,
        )
        for name, each in targets.items()
    }
    file = folder / f"{len(targets)}-{seed}.safetensors"
    with file.open("wb") as opened:
        write_lora(opened, factors, {})
    return file


def _pipeline(name: str, transformer: Any) -> Any:
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    return PIPELINES[name](transformer=transformer, **parts)


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    with torch.no_grad():
        work()
    return time.process_time() - start


def _median_ratio(theirs: list[float], ours: float) -> str:
    return f"{statistics.median(theirs) / ours:,.0f}×"


def _shown(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2f} s"


if __name__ == "__main__":
    main()
