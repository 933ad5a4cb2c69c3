"""The parts of `lab.benchmarks.gpu_check`, each run in a process of its own."""

import gc
import importlib.util
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from adapters.archive import read_archive
from families.family import Family
from families.loading import load_family
from families.quantization import QUANTIZATIONS
from families.registry import find_base
from families.without_weights import family_without_weights
from inference import acceleration
from inference.acceleration import compile_blocks, is_compiled, use_attention, with_fallback
from inference.engine import Engine
from inference.generation import generate_once
from inference.request import Request
from lab.benchmarks import gpu
from lab.benchmarks.memory import filled, held_against_plan, random_family
from lab.benchmarks.random_base import write_images, write_random_base
from lab.benchmarks.step_profile import Profile, loop_of, profiled
from trainer.learning.loss import flow_loss
from trainer.memory.fitting import usable
from trainer.memory.plan import LADDER, Mode
from trainer.memory.step_cost import Shape, decode_load
from trainer.run import train
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import TrainingInputs

PASSED, FAILED, SKIPPED, MEASURED = "passed", "failed", "skipped", "measured"
# On an H100 the plan was within 1.2 % of the allocator (docs/memory.md).
PLAN_LIMIT = 0.05
# Resumed weights against those of a run without a stop, as a share of their norm. On a CPU they
# are equal; GPUs add in another order from run to run.
RESUME_LIMIT = 0.02
BLOCKS, TEXT_LAYERS = 6, 6  # of models that are not measured at their published size
WITH_TOKEN, FIRST_STEP, JUDGING = 1.25, 15.0, 10.0  # goals: ratio to a step without, seconds
MODELS = "models-"  # in the names of folders
ALL_MODES = (*LADDER, Mode("nf4", False, True), Mode("nf4", True, True))


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    what: str
    state: str
    value: float | None = None
    unit: str = ""
    planned: float | None = None
    note: str = ""

    def cells(self) -> list[str]:
        """The row as cells of a Markdown table."""
        value = "" if self.value is None else f"{self.value:.4g} {self.unit}".strip()
        planned = "" if self.planned is None else f"{self.planned:.4g} {self.unit}".strip()
        return [self.part, self.what, self.state, value, planned, self.note.replace("|", "\\|")]


@dataclass(frozen=True)
class Check:
    """What is run: where, how much of it, and in which folder."""

    device: torch.device
    quick: bool
    folder: Path
    only: tuple[str, ...] = ()

    @property
    def gpu(self) -> bool:
        """Whether this measures a GPU, and not only that the script works."""
        return self.device.type == "cuda"

    @property
    def flags(self) -> list[str]:
        """The options of a process that runs one part."""
        return ["--quick"] * self.quick + ["--cpu"] * (not self.gpu)

    @property
    def parts(self) -> list[str]:
        """The names of the parts, the most telling first."""
        return [
            name
            for name in PARTS
            if (name in self.only or not self.only) and not (self.quick and name in FULL_ONLY)
        ]

    @property
    def base(self) -> str:
        """The base that memory and speed are measured on."""
        return "z-image-turbo" if self.gpu else "miniature-turbo"

    @property
    def edge(self) -> int:
        """Pixels of its images."""
        return 1024 if self.gpu else 32

    @property
    def modes(self) -> list[Mode]:
        """The memory modes that are measured."""
        return [mode for mode in ALL_MODES if mode.checkpointing or not self.quick]

    def vault(self) -> Path:
        """A `$MODEL_VAULT` for the random bases of one part, in use from now on."""
        folder = Path(tempfile.mkdtemp(prefix=MODELS, dir=self.folder))
        os.environ |= {"MODEL_VAULT": str(folder), "HF_HUB_OFFLINE": "1"}
        return folder


def packages(check: Check) -> Iterator[Row]:
    """Packages and quantizations that are missing here."""
    for name, each in QUANTIZATIONS.items():
        there = importlib.util.find_spec(each.package) is not None
        runs = name in usable(check.device)
        note = "" if runs else (f"needs {'a GPU' if there else each.requirement}")
        yield Row("packages", name, PASSED if runs else SKIPPED, note=note)


def fallbacks(check: Check) -> Iterator[Row]:
    """Compiled blocks and cuDNN attention, and what happens if they fail."""
    write_random_base(
        check.vault(), find_base("z-image-turbo"), check.device, 2, 2, tiny=not check.gpu
    )
    family = load_family(find_base("z-image-turbo"), check.device)
    side = 512 if check.gpu else 64
    transformer = family.transformer

    def image() -> None:
        with_fallback(transformer, lambda: generate_once(family, side, side, 1.0))

    image()
    hopper = check.gpu and torch.cuda.get_device_capability() >= acceleration.HOPPER
    if hopper:
        use_attention(transformer, acceleration.HOPPER_ATTENTION)
        image()
        kept = "attention" in acceleration._noted(transformer)
        yield Row("fallbacks", "cuDNN attention works", PASSED if kept else FAILED)
    compile_blocks(transformer, "inductor" if check.gpu else "eager")
    began = time.perf_counter()
    image()
    seconds = time.perf_counter() - began
    state = PASSED if is_compiled(transformer) else FAILED
    yield Row("fallbacks", "blocks are compiled", state, seconds, "s")

    def broken(*_: Any) -> Any:
        raise RuntimeError("this compiler always fails")

    torch._dynamo.reset()
    compile_blocks(transformer, broken)  # type: ignore[arg-type]
    image()
    state = FAILED if is_compiled(transformer) else PASSED
    yield Row("fallbacks", "a failing compiler ends in plain blocks", state)


def product(check: Check, name: str, blocks: int | None, text_layers: int | None) -> Iterator[Row]:
    """A whole run, the same one stopped and resumed, and an image with the result."""
    base, part = find_base(name), name
    began = time.perf_counter()
    folder = write_random_base(
        check.vault(), base, check.device, blocks, text_layers, tiny=not check.gpu
    )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9
    yield Row(part, "write random weights", MEASURED, time.perf_counter() - began, "s",
              note=f"{size:.1f} GB, {blocks or 'all'} blocks")  # fmt: skip
    _empty(check.device)
    with HostMemory() as host:
        yield from _runs(check, part)
    yield Row(part, "CPU memory, peak", MEASURED, host.peak / 1e9, "GB")


def _runs(check: Check, part: str) -> Iterator[Row]:
    dataset = write_images(check.folder / f"{part}.zip", check.edge * (1 if check.gpu else 2))
    steps = (12 if check.quick else 20) if check.gpu else 6
    side = 768 if check.gpu else 64

    def settings(folder: str, **changes: Any) -> Settings:
        values: dict[str, Any] = {
            **{"dataset": dataset, "base_model": part, "steps": steps, "seed": 1},
            **{"resolution": str(check.edge * (1 if check.gpu else 2)), "batch_size": 1},
            **{"checkpoint_every": steps // 2, "sample_every": steps // 2, "rank": 16},
            **{"sample_prompts": "a photo of <zwx>", "validation_every": steps // 2},
            "sample_options": {"num_inference_steps": 4, "width": side, "height": side},
            "preserve_prompts": [f"a {k} thing" for k in range(8)] + ["a red TOK"],
            "output_dir": check.folder / part / folder,
        }
        return resolve(TrainingInputs(**values | changes))

    began = time.perf_counter()
    whole = train(settings("whole"))
    seconds = time.perf_counter() - began
    record = json.loads((whole.parent / "record.json").read_text(encoding="utf-8"))
    timings = record["timings"]
    yield Row(part, f"train {steps} steps", MEASURED, seconds, "s")
    for phase, taken in timings["phases"].items():
        state = MEASURED
        if phase == "checking" and check.gpu:
            state = PASSED if taken <= JUDGING else FAILED
        yield Row(part, f"time: {phase}", state, taken, "s")
    rate = 1 / timings["steps_per_second"]
    yield Row(part, "a step, compilation included", MEASURED, rate, "s")
    if timings["peak_gpu_bytes"]:
        yield Row(part, "GPU memory, peak", MEASURED, timings["peak_gpu_bytes"] / 1e9, "GB")
    for found in record["checks"]:
        bad = found["state"] == FAILED and "loss" not in found["name"]
        state = FAILED if bad else PASSED
        yield Row(part, f"check: {found['name']}", state, note=found["sentence"])

    # Stop it in the middle, as Ctrl-C does, and resume.
    def interrupt(metric: str, value: float) -> None:
        if metric == "step" and value >= steps // 2:
            raise KeyboardInterrupt

    try:
        train(settings("stopped"), interrupt)
        yield Row(part, "stop", FAILED, note="it was not stopped")
    except KeyboardInterrupt:
        yield Row(part, "stop", PASSED)
    newest = max((check.folder / part / "stopped" / "checkpoints").glob("step-*.safetensors"))
    resumed = train(settings("resumed", resume_from=newest))
    one, other = (read_archive(each).factors for each in (whole, resumed))
    change = sum((one[k][1] - other[k][1]).norm().item() for k in one)
    share = change / sum(pair[1].norm().item() for pair in one.values())
    state = PASSED if share <= (RESUME_LIMIT if check.gpu else 0) else FAILED
    yield Row(part, "resumed weights differ by", state, 100 * share, "%")

    engine, began = Engine(), time.perf_counter()
    engine.warm_up(whole)
    yield Row(part, "load and compile", MEASURED, time.perf_counter() - began, "s")
    assert engine._family is not None
    compiled = is_compiled(engine._family.transformer)
    state = PASSED if compiled or not check.gpu else FAILED
    yield Row(part, "blocks", state, note="compiled" if compiled else "plain")
    for what in ("predict", "predict again"):
        began = time.perf_counter()
        request = Request(prompt="a <zwx>", seed=1, width=side, height=side, num_inference_steps=4)
        images = engine.generate(request)
        state = PASSED if len(images) == 1 else FAILED
        yield Row(part, what, state, time.perf_counter() - began, "s")


def z_image(check: Check) -> Iterator[Row]:
    """Z-Image from training to an image; at its full size with --full."""
    cut = check.quick and check.gpu
    yield from product(
        check, "z-image-turbo", BLOCKS if cut else None, TEXT_LAYERS if cut else None
    )


def qwen_image(check: Check) -> Iterator[Row]:
    """Qwen-Image with 6 blocks from training to an image."""
    sizes = (BLOCKS, TEXT_LAYERS) if check.gpu else (None, None)
    yield from product(check, "qwen-image", *sizes)


def memory(check: Check) -> Iterator[Row]:
    """The plan against the allocator in every memory mode, Z-Image at its published size."""
    settings = resolve(
        TrainingInputs(
            dataset=Path("unread.zip"), base_model=check.base, resolution=str(check.edge), seed=1
        )
    )
    yield from _modes(check, "memory", settings, check.modes)


def memory_qwen(check: Check) -> Iterator[Row]:
    """The plan against the allocator in every memory mode, Qwen-Image with 6 blocks."""
    sizes = (BLOCKS, TEXT_LAYERS) if check.gpu else (None, None)
    blocks, layers = sizes
    write_random_base(
        check.vault(), find_base("qwen-image"), check.device, blocks, layers, tiny=not check.gpu
    )
    settings = resolve(
        TrainingInputs(
            dataset=Path("unread.zip"), base_model="qwen-image", resolution=str(check.edge), seed=1
        )
    )
    yield from _modes(check, "memory_qwen", settings, check.modes)


def _modes(check: Check, part: str, settings: Settings, modes: list[Mode]) -> Iterator[Row]:
    held = held_against_plan(settings, check.device, modes)
    while True:
        with HostMemory() as host:
            found = next(held, None)
        if found is None:
            return
        what, planned = found.mode.label, found.planned / 1e9
        if found.skipped:
            allowed = "cannot run here" in found.skipped or "do not fit" in found.skipped
            state = SKIPPED if allowed else FAILED
            yield Row(part, what, state, None, "GB", planned, found.skipped)
            continue
        note = f"{found.seconds:.2f} s a step, CPU memory {host.peak / 1e9:.1f} GB"
        if found.measured is None or found.off is None:
            yield Row(part, what, PASSED, None, "GB", planned, note)
        else:
            state = PASSED if abs(found.off) <= PLAN_LIMIT else FAILED
            note = f"off by {found.off:.1%}, {note}"
            yield Row(part, what, state, found.measured / 1e9, "GB", planned, note)


def profile(check: Check) -> Iterator[Row]:
    """Where the time of a real step goes, with and without a placeholder token."""
    found: dict[bool, Profile] = {}
    for placeholder in (False, True):
        edge = check.edge * (1 if check.gpu else 2)
        loop = loop_of(check.base, check.device, placeholder, edge=edge)
        each = found[placeholder] = profiled(loop)
        del loop
        _empty(check.device)
        torch._dynamo.reset()
        what = "with a token" if placeholder else "without a token"
        parts = ", ".join(f"{k} {v * 1e3:.0f} ms" for k, v in each.parts.items())
        note = f"waiting for each {each.waiting * 1e3:.0f} ms, busy {each.busy * 1e3:.0f} ms"
        note += f", {each.launches} launches, {each.waits} waits; process: {parts}"
        yield Row("profile", f"a step {what}", MEASURED, each.ahead * 1e3, "ms", note=note)
        state = MEASURED
        if check.gpu:
            state = PASSED if each.first <= FIRST_STEP else FAILED
        yield Row("profile", f"the first step {what}", state, each.first, "s")
    ratio = found[True].ahead / found[False].ahead
    state = MEASURED
    if check.gpu:
        state = PASSED if ratio <= WITH_TOKEN else FAILED
    yield Row("profile", "the token costs", state, ratio, "x", WITH_TOKEN)


def rows(check: Check) -> Iterator[Row]:
    """Preservation's rows and images: another size than the batch, compiled and quantized."""
    for kind in ("none", "int8", "nf4"):
        what = "compiled" if kind == "none" else kind
        if kind not in ("none", *usable(check.device)):
            yield Row("rows", what, SKIPPED, note=f"{kind} cannot run here")
            continue
        settings = resolve(
            TrainingInputs(
                dataset=Path("unread.zip"), base_model=check.base, seed=1,
                train_placeholder_token=False, trigger_word="x",
            )
        )  # fmt: skip
        family = random_family(settings, Mode(kind, checkpointing=True), check.device)
        if kind == "none" and check.gpu:
            compile_blocks(family.transformer, several_sizes=True)
        large = gpu._inputs(family, gpu.Case(check.base, "step", check.edge))
        small = gpu._inputs(family, gpu.Case(check.base, "step", max(32, check.edge // 2)))
        with torch.no_grad():
            seconds = gpu.seconds(partial(_velocity, family, *small), check.device, 3)
        yield Row("rows", f"{what}: one step of an image", MEASURED, seconds * 1e3, "ms")
        lora = gpu.Lora(family.transformer, family.lora_targets(), 16, 0)

        def step(f: Family = family, both: tuple[Any, ...] = (large, small)) -> None:
            for latents, text in both:
                sigma = torch.full((1,), 0.5, device=check.device)
                flow_loss(f, latents, torch.randn_like(latents), sigma, text).backward()

        both = gpu.seconds(step, check.device, 3)
        alone = gpu.seconds(partial(step, both=(large,)), check.device, 3)
        yield Row("rows", f"{what}: a step with a row", MEASURED, both * 1e3, "ms",
                  note=f"{both / alone:.2f} of one without")  # fmt: skip
        finite = all(bool(each.grad is None or each.grad.isfinite().all()) for each in
                     lora.parameters())  # fmt: skip
        yield Row("rows", f"{what}: gradients are finite", PASSED if finite else FAILED)
        del family, lora, step
        _empty(check.device)
        torch._dynamo.reset()


def _velocity(family: Family, latents: Any, text: Any) -> Any:
    return family.velocity(latents, torch.full((1,), 0.5, device=family.device), text)


def decoding(check: Check) -> Iterator[Row]:
    """The largest image through the VAE."""
    edge = 2048 if check.gpu else 128
    family = family_without_weights(find_base(check.base))
    planned = decode_load(family, Shape(1, 1, edge, edge, 1)).bytes / 1e9
    family.device = check.device
    vars(family)["vae"] = filled(family.vae, check.device).float()
    size = family.latent_size(edge, edge)
    latents = torch.randn(1, family.latent_channels, *size, device=check.device)
    what, taken, before = f"{edge} x {edge} pixels", 0.0, 0
    if check.gpu:
        torch.cuda.reset_peak_memory_stats(check.device)
        before = torch.cuda.memory_allocated(check.device)
    began = time.perf_counter()
    with torch.no_grad():
        family.decode(latents)
    if not check.gpu:
        yield Row("decoding", what, PASSED, None, "GB", planned)
        return
    torch.cuda.synchronize(check.device)
    taken = (torch.cuda.max_memory_allocated(check.device) - before) / 1e9
    state = PASSED if taken < 1.5 * planned else FAILED  # convolutions have workspaces
    note = f"{time.perf_counter() - began:.1f} s"
    yield Row("decoding", what, state, taken, "GB", planned, note)


def speed(check: Check) -> Iterator[Row]:
    """Steps, images and changes of the LoRA at published sizes, and PEFT's step beside ours."""
    side = gpu.PRODUCT if check.gpu else 64
    rate = gpu.matmul_rate(check.device, side)
    yield Row("speed", f"a bfloat16 product of {side}", MEASURED, rate / 1e12, "TFLOP/s")
    few = 8 if check.gpu else 2
    again = gpu.Case(check.base, "step", check.edge, checkpointing=True)
    cases = [again, gpu.Case(check.base, "draw", check.edge, steps=few)]
    if not check.quick:
        cases += [replace(again, checkpointing=False), gpu.Case(check.base, "swap")]
        cases += [replace(again, work="peer")]
    if not check.quick and check.gpu:
        large = replace(again, base="qwen-image")
        cases += [large, replace(large, work="draw", steps=10), replace(large, work="swap")]
    ours = math.nan
    for case in cases:
        if case.work == "peer":
            seconds = _peft_step(check, case)
            note = "bfloat16, recomputed, not compiled, as the usual scripts do"
            yield Row("speed", "PEFT: a step", MEASURED, seconds * 1e3, "ms",
                      note=f"{note}; ours is {ours / seconds:.2f} of it")  # fmt: skip
            continue
        try:
            what, taken, used, _, share = gpu.measure(case, check.device, rate, repeats=3)
        except torch.OutOfMemoryError:
            yield Row("speed", str(case), SKIPPED, note="does not fit")
            continue
        finally:
            _empty(check.device)
            torch._dynamo.reset()
        if case == again:
            value, unit = taken.split()
            ours = float(value) / (1e3 if unit == "ms" else 1)
        note = f"{used}, {share} of the product's rate" if used else ""
        yield Row("speed", what, MEASURED, note=f"{taken} {note}".strip())


def _peft_step(check: Check, case: gpu.Case) -> float:
    """Seconds of a step with PEFT's own layers, as diffusers' training scripts run it."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = resolve(
        TrainingInputs(
            dataset=Path("unread.zip"), base_model=case.base, seed=0,
            train_placeholder_token=False,
        )
    )  # fmt: skip
    family = random_family(settings, Mode(checkpointing=True), check.device)
    config = LoraConfig(r=gpu.RANK, lora_alpha=gpu.RANK, target_modules=family.lora_targets())
    inject_adapter_in_model(config, family.transformer)
    named = dict(family.transformer.named_parameters())
    trained = [each for name, each in named.items() if "lora_" in name]
    for each in trained:
        each.data = each.data.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    latents, text = gpu._inputs(family, case)

    def step() -> None:
        sigma = torch.full((1,), 0.5, device=check.device)
        flow_loss(family, latents, torch.randn_like(latents), sigma, text).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return gpu.seconds(step, check.device, 3)


class HostMemory:
    """The most resident memory of this process within the context; `peak` is in bytes."""

    def __init__(self) -> None:
        self.peak, self._process = 0, psutil.Process()
        self._status = Path("/proc/self/status")

    def __enter__(self) -> "HostMemory":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak begins again
        except OSError:
            self._status = Path("/nonexistent")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = self._process.memory_info().rss
        if self._status.is_file():
            for line in self._status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[Check], Iterator[Row]]] = {
    "packages": packages,
    "profile": profile,
    "z_image": z_image,
    "memory": memory,
    "qwen_image": qwen_image,
    "fallbacks": fallbacks,
    "rows": rows,
    "memory_qwen": memory_qwen,
    "decoding": decoding,
    "speed": speed,
}
FULL_ONLY = ("rows", "memory_qwen", "decoding")
