"""Parts of `lab.benchmarks.gpu_check`: packages, fallbacks, and whole runs of both families."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from adapters.archive import read_archive
from families.loading import load_family
from families.quantization import QUANTIZATIONS, usable
from families.registry import find_base
from inference import acceleration
from inference.acceleration import compile_blocks, is_compiled, use_attention, with_fallback
from inference.engine import Engine
from inference.generation import generate_once
from inference.request import Request
from lab.benchmarks.gpu_check_rows import (
    BLOCKS,
    FAILED,
    MEASURED,
    PASSED,
    SKIPPED,
    TEXT_LAYERS,
    Check,
    HostMemory,
    Row,
    empty,
)
from lab.benchmarks.random_base import write_images, write_random_base
from trainer.run import train
from trainer.settings.fields import Settings, resolve
from trainer.settings.inputs import TrainingInputs

# Resumed weights against those of a run without a stop, as a share of their norm. On a CPU they
# are equal; GPUs add in another order from run to run.
RESUME_LIMIT = 0.02
CHECKING = 10.0  # seconds, a goal
ROOT = Path(__file__).parents[2]
# Starts as the server does; prints when it is ready, and when the first image is there.
SERVER = """
import time
from predict import Predictor
predictor = Predictor()
predictor.setup(None)
ready = time.time()
predictor.predict(prompt="a photo", seed=1, num_inference_steps=4, aspect_ratio="1:1")
print(ready, time.time(), flush=True)
"""


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
    compile_blocks(transformer, check.backend)
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
    empty(check.device)
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
        state = check.state(taken <= CHECKING) if phase == "checking" else MEASURED
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


def server(check: Check) -> Iterator[Row]:
    """Two starts of the server with 6 blocks: without compiled code on disk, and with it."""
    blocks, layers = (BLOCKS, TEXT_LAYERS) if check.gpu else (None, None)
    vault, name = check.vault(), "z-image-turbo"
    write_random_base(vault, find_base(name), check.device, blocks, layers, tiny=not check.gpu)
    empty(check.device)
    folder = check.folder / "server"
    folder.mkdir()
    variables = {"BASE_MODEL": name, "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    for what in ("cold", "warm"):
        began = time.time()
        child = subprocess.run(
            [sys.executable, "-c", SERVER],
            env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        ready, done = map(float, child.stdout.split()[-2:])
        yield Row("server", f"{what} start", MEASURED, ready - began, "s")
        yield Row("server", f"first image after a {what} start", MEASURED, done - ready, "s")
