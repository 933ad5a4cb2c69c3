"""python -m lab.benchmarks.step_profile: where the time of a real training step goes.

Needs no weights: a base of the published size gets random numbers. Runs the trainer's own loop
with and without a placeholder token, compiled as in training, over images of two sizes and
captions of several lengths, and prints: seconds per step while the process runs ahead of the
device, and while it waits for the device after each step; how long the device was busy; how many
kernels were started and how often the process waited; the time of each part of a step.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from adapters.lora import Lora
from adapters.placeholder import Placeholder
from families.components import load_tokenizer
from families.family import WeightStorage
from families.registry import find_base
from families.tokens import PromptTokenizer
from inference.acceleration import compile_blocks, wanted_in_training
from lab.benchmarks.machine import machine
from lab.benchmarks.memory import random_family
from trainer.learning.features import Captions
from trainer.learning.loop import Loop
from trainer.learning.samples import Sample
from trainer.memory.plan import Mode
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

SUBJECT = "<zwx>"
UNQUANTIZED = Mode()
TIMED, PROFILED = 8, 2  # steps
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")  # and names that begin so
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # only this file syncs the device
PARTS = ("batch", "text", "transformer", "optimizer")


@dataclass(frozen=True)
class Profile:
    """What was measured of one kind of step."""

    ahead: float  # seconds per step, the device waited for at the end only
    waiting: float  # the same, waited for after each step
    first: float  # seconds of the first step, compilation included
    busy: float  # seconds per step that the device computed; 0 on a CPU
    launches: int  # kernels per step; operations on a CPU
    waits: int  # per step
    parts: dict[str, float]  # seconds of the process per step; the rest is mostly backward
    peak: int  # bytes on the device

    def lines(self) -> Iterator[str]:
        """The figures, one a line."""
        yield f"  first step {self.first:.1f} s"
        yield f"  a step {self.ahead * 1e3:.0f} ms, {self.waiting * 1e3:.0f} ms waiting for each"
        yield f"  device busy {self.busy * 1e3:.0f} ms, peak {self.peak / 1e9:.1f} GB"
        yield f"  {self.launches} launches and {self.waits} waits in a step"
        yield "  process: " + ", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in self.parts.items())


@dataclass(frozen=True)
class Counts:
    """What a profiler counted."""

    busy: float  # seconds that the device computed; 0 on a CPU
    launches: int  # kernels; operations on a CPU
    waits: int
    parts: dict[str, float]  # seconds of the process in each part of a step


def loop_of(
    base: str,
    device: torch.device,
    placeholder: bool,
    mode: Mode = UNQUANTIZED,
    edge: int = 1024,
    compiled: bool | None = None,
) -> Loop:
    """The trainer's loop on a random base, compiled as in training or as `compiled` says."""
    given: dict[str, Any] = {"base_model": base, "seed": 0, "preserve": "off", "steps": 1000}
    given |= {"batch_size": 1, "resolution": str(edge), "caption_dropout": 0.0}
    given |= {"timestep_sampling": "logit_normal", "validation_every": 0}
    settings = resolve(TrainingInputs(dataset=Path("unread.zip"), **given))
    family = random_family(settings, mode, device)
    family.storage = WeightStorage()
    tokenizer = load_tokenizer(find_base("miniature-turbo"), "tokenizer")
    prompts = PromptTokenizer(tokenizer, family._template(tokenizer))
    width = family.text_encoder.get_input_embeddings().weight.shape[1]
    vars(family).update(prompts=prompts, text_width=width)

    samples = []
    for number in range(4):
        across = edge if number % 2 else edge * 7 // 8 // 32 * 32
        shape = (family.latent_channels, *family.latent_size(across, edge))
        caption = f"a photo of {SUBJECT if placeholder else 'a cat'}" + " in the snow" * number
        samples.append(Sample(f"{number}", caption, torch.randn(shape), torch.zeros(shape)))
    placeholders = []
    if placeholder:
        placeholders = [Placeholder.create(SUBJECT, width, 1e-5, 0, device)]
    vectors = {each.token: each.vectors for each in placeholders}
    captions = Captions(family, [each.caption for each in samples], vectors)
    lora = Lora(family.transformer, family.lora_targets(), settings.rank, 0)
    if wanted_in_training(device) if compiled is None else compiled:
        captions.compile()
        if not mode.offload:
            compile_blocks(family.transformer, several_sizes=True)
    return Loop(family, settings, samples, captions, lora, placeholders)


def profiled(loop: Loop, trace: Path | None = None) -> Profile:
    """Measures steps of a loop, after all shapes have been seen."""
    device = loop.family.device
    gpu = device.type == "cuda"

    def wait() -> None:
        if gpu:
            torch.cuda.synchronize(device)

    def run(steps: int, waiting: bool) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            loop.step(loop.done)
            if waiting:
                wait()
        wait()
        return (time.perf_counter() - start) / steps

    first = run(1, waiting=True)
    run(2 * loop.batches.period, waiting=True)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    ahead, waiting = run(TIMED, waiting=False), run(TIMED, waiting=True)
    peak = torch.cuda.max_memory_allocated(device) if gpu else 0
    with ExitStack() as named:
        for name, owner, method in (
            ("batch", loop, "batch"),
            ("text", loop.captions, "features"),
            ("transformer", loop.family, "velocity"),
            *(("optimizer", each, "step") for each in loop.optimizers.values()),
        ):
            named.enter_context(patch.object(owner, method, _named(name, getattr(owner, method))))
        counts = counted(lambda: run(PROFILED, waiting=False), device, trace)
    launches, waits = counts.launches // PROFILED, counts.waits // PROFILED
    parts = {name: taken / PROFILED for name, taken in counts.parts.items()}
    return Profile(ahead, waiting, first, counts.busy / PROFILED, launches, waits, parts, peak)


def counted(work: Callable[[], object], device: torch.device, trace: Path | None = None) -> Counts:
    """What the profiler counts while `work` runs."""
    gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        work()
        if gpu:
            torch.cuda.synchronize(device)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    events: list[Any] = list(profiler.key_averages())
    parts = dict.fromkeys(PARTS, 0.0)
    for each in events:  # a name may have a row for the process and one for the device
        if each.key in PARTS:
            parts[each.key] += each.cpu_time_total / 1e6
    begins = LAUNCHES if gpu else ("aten::",)
    launches = sum(each.count for each in events if each.key.startswith(begins))
    waits = sum(each.count for each in events if each.key in WAITS)
    busy = 0.0
    if gpu:
        on_device = [each for each in profiler.events() if str(each.device_type).endswith("CUDA")]
        kernels = [each for each in on_device if each.name not in PARTS]  # these are only names
        busy = sum(each.self_device_time_total for each in kernels) / 1e6
    return Counts(busy, launches, waits, parts)


def _named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return call(*arguments, **named)

    return called


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lab.benchmarks.step_profile", description=__doc__
    )
    parser.add_argument("--base", default="z-image-turbo")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--trace", type=Path, help="write a trace for chrome://tracing here")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, edge = (given.base, 1024) if device.type == "cuda" else ("miniature-turbo", 64)
    print(machine())
    for placeholder in (False, True):
        print(f"{base}, {'with' if placeholder else 'without'} a placeholder token")
        mode = Mode(checkpointing=given.checkpointing)
        loop = loop_of(base, device, placeholder, mode, edge)
        for line in profiled(loop, given.trace).lines():
            print(line)
        del loop


if __name__ == "__main__":
    main()
