"""Parts of `lab.benchmarks.gpu_check`: the time of steps and images."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from families import quantization
from families.family import Family
from families.packed_weights import has_float8_products
from inference.acceleration import compile_blocks
from lab.benchmarks import gpu
from lab.benchmarks.gpu_check_rows import FAILED, MEASURED, PASSED, SKIPPED, Check, Row, empty
from lab.benchmarks.memory import random_family
from lab.benchmarks.step_profile import Profile, loop_of, profiled
from trainer.learning.loss import flow_loss
from trainer.memory.fitting import usable
from trainer.memory.plan import Mode
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

WITH_TOKEN, FIRST_STEP = 1.25, 15.0  # goals: ratio to a step without, seconds
STORED_STEP = 1.1  # goal: a compiled step on a quantized base, in ratio to 16 bits
FLOAT8_IMAGE = 0.6  # goal: seconds of an image in 8 steps with float8 products, on an H100


def profile(check: Check) -> Iterator[Row]:
    """Where the time of a real step goes, with and without a placeholder token."""
    found: dict[bool, Profile] = {}
    for placeholder in (False, True):
        edge = check.edge * (1 if check.gpu else 2)
        loop = loop_of(check.base, check.device, placeholder, edge=edge)
        each = found[placeholder] = profiled(loop)
        del loop
        empty(check.device)
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
    """Preservation's rows and images: another size than the batch, compiled."""
    for kind in ("none", "int8", "nf4"):
        what = "16 bits" if kind == "none" else kind
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
        if check.gpu:
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
        empty(check.device)
        torch._dynamo.reset()


def _velocity(family: Family, latents: Any, text: Any) -> Any:
    return family.velocity(latents, torch.full((1,), 0.5, device=family.device), text)


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
            empty(check.device)
            torch._dynamo.reset()
        if case == again:
            value, unit = taken.split()
            ours = float(value) / (1e3 if unit == "ms" else 1)
        note = f"{used}, {share} of the product's rate" if used else ""
        yield Row("speed", what, MEASURED, note=f"{taken} {note}".strip())


def quantized(check: Check) -> Iterator[Row]:
    """Compiled steps and images on a quantized base, in ratio to 16 bits; float8 products."""
    few = 8 if check.gpu else 2
    steps = [
        gpu.Case(check.base, "step", check.edge, checkpointing=again) for again in (False, True)
    ]
    cases = {
        "a step, activations kept": (steps[0], STORED_STEP),
        "a step, activations recomputed": (steps[1], STORED_STEP),
        f"an image in {few} steps": (gpu.Case(check.base, "draw", check.edge, steps=few), math.inf),
    }
    for what, (case, most) in cases.items():
        unquantized = math.nan
        for kind in ("none", "int8", "nf4", "fp8, dequantized", "fp8, products"):
            name = f"{what}: {'16 bits' if kind == 'none' else kind}"
            try:
                seconds, peak, why = _quantized(check, case, kind)
            except torch.OutOfMemoryError:
                yield Row("quantized", name, SKIPPED, note="does not fit")
                continue
            finally:
                empty(check.device)
                torch._dynamo.reset()
            if why:
                yield Row("quantized", name, SKIPPED, note=why)
                continue
            if kind == "none":
                unquantized = seconds
            state, ratio = MEASURED, seconds / unquantized
            if check.gpu and kind != "none":
                state = FAILED if ratio > most else PASSED
            if check.gpu and case.work == "draw" and kind == "fp8, products":
                state = PASSED if seconds <= FLOAT8_IMAGE else FAILED
            note = f"{ratio:.2f} of 16 bits" + (f", peak {peak / 1e9:.1f} GB" if peak else "")
            yield Row("quantized", name, state, seconds * 1e3, "ms", note=note)


def _quantized(check: Check, case: gpu.Case, kind: str) -> tuple[float, int, str]:
    """Seconds and peak bytes of a compiled step or image, or why it is not measured."""
    stored, _, how = kind.partition(", ")
    if stored not in ("none", *usable(check.device)):
        return 0.0, 0, f"{stored} cannot run here"
    if how == "products" and not has_float8_products(check.device):
        return 0.0, 0, "no products in float8 here"
    settings = resolve(
        TrainingInputs(
            dataset=Path("unread.zip"), base_model=case.base, seed=0,
            train_placeholder_token=False,
        )
    )  # fmt: skip
    products = patch.object(quantization, "has_float8_products", lambda _: how == "products")
    with products:
        family = random_family(settings, Mode(stored), check.device)
    work = gpu.generation(family, case) if case.work == "draw" else gpu.training_step(family, case)
    compile_blocks(family.transformer, "inductor" if check.gpu else "eager")
    if check.gpu:
        torch.cuda.reset_peak_memory_stats(check.device)
    seconds = gpu.seconds(work, check.device, 3)
    peak = torch.cuda.max_memory_allocated(check.device) if check.gpu else 0
    return seconds, peak, ""


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
