"""Parts of `lab.benchmarks.gpu_check`: the time of steps and images."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from adapters.lora import Lora
from families.family import Family
from families.quantization import usable
from inference.acceleration import compile_blocks, compile_text_encoder, is_compiled
from lab.benchmarks import gpu
from lab.benchmarks.gpu_check_rows import FAILED, MEASURED, PASSED, SKIPPED, Check, Row, empty
from lab.benchmarks.peers import OURS, Found, compared
from lab.benchmarks.step_profile import Profile, counted, loop_of, profiled
from trainer.learning.loop import Loop
from trainer.learning.loss import flow_loss
from trainer.memory.plan import Mode

WITH_TOKEN, FIRST_STEP = 1.25, 15.0  # goals: ratio to a step without, seconds


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
        state = check.state(each.first <= FIRST_STEP)
        yield Row("profile", f"the first step {what}", state, each.first, "s", FIRST_STEP)
        if each.peak:
            yield Row("profile", f"peak memory {what}", MEASURED, each.peak / 1e9, "GB")
    ratio = found[True].ahead / found[False].ahead
    state = check.state(ratio <= WITH_TOKEN)
    yield Row("profile", "the token costs", state, ratio, "x", WITH_TOKEN)


def rows(check: Check) -> Iterator[Row]:
    """Preservation's rows and images: another size than the batch, compiled."""
    for kind in ("none", "int8", "nf4"):
        what = "16 bits" if kind == "none" else kind
        if kind not in ("none", *usable(check.device)):
            yield Row("rows", what, SKIPPED, note=f"{kind} cannot run here")
            continue
        family = gpu.random_base(check.base, check.device, Mode(kind, checkpointing=True))
        if check.gpu:
            compile_blocks(family.transformer, several_sizes=True)
        large = gpu.random_inputs(family, gpu.Case(check.base, gpu.STEP, check.edge))
        small = gpu.random_inputs(family, gpu.Case(check.base, gpu.STEP, max(32, check.edge // 2)))
        with torch.no_grad():
            seconds = gpu.seconds(partial(_velocity, family, *small), check.device, 3)
        yield Row("rows", f"{what}: one step of an image", MEASURED, seconds * 1e3, "ms")
        lora = Lora(family.transformer, family.lora_targets(), 16, 0)

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


def text_encoder(check: Check) -> Iterator[Row]:
    """The text encoder's part of a step with a token, plain and compiled."""
    taken: dict[bool, float] = {}
    for compiled in (False, True):
        loop = loop_of(check.base, check.device, True, edge=check.edge, compiled=False)
        if compiled:
            compile_text_encoder(loop.family, check.backend)
        captions = sorted(loop.captions.trained)

        def both(captions: Sequence[str] = captions, loop: Loop = loop) -> None:
            for caption in captions:
                loop.captions.features([caption])[0].square().mean().backward()

        taken[compiled] = gpu.seconds(both, check.device, 5) / len(captions)
        counts = counted(both, check.device)
        what = "compiled" if compiled else "plain, with a cache of the common beginning"
        note = f"{counts.launches // len(captions)} launches, {counts.waits // len(captions)} waits"
        note += f", busy {counts.busy / len(captions) * 1e3:.1f} ms"
        kept = is_compiled(loop.family.text_encoder)  # unless it failed
        state = MEASURED if kept == compiled else FAILED
        yield Row("text_encoder", f"forward and backward: {what}", state, taken[compiled] * 1e3,
                  "ms", note=note)  # fmt: skip
        del loop, both
        empty(check.device)
        torch._dynamo.reset()
    ratio = taken[True] / taken[False]
    yield Row("text_encoder", "compiled, of plain", check.state(ratio < 1), ratio, "x")


def peers(check: Check) -> Iterator[Row]:
    """Our step beside PEFT's: bfloat16, or float32 under autocast; in every mode."""
    ours: dict[str, Found] = {}
    for found in compared(check.base, check.edge, check.device, repeats=3 if check.gpu else 1):
        program, mode = found.variant.program, found.variant.mode
        if found.measured is None:  # a peer's failure is not ours
            state = FAILED if program == OURS and found.why != "does not fit" else SKIPPED
            yield Row("peers", f"{program}: {mode}", state, note=found.why)
            continue
        if program == OURS:
            ours[mode] = found
        note, ratio = f"peak {found.measured.peak / 1e9:.1f} GB", found.ratio(ours.get(mode))
        if program != OURS and ratio is not None:
            note += f"; ours takes {ratio:.2f} of it"
        yield Row("peers", f"{program}: {mode}", MEASURED, found.measured.seconds * 1e3, "ms",
                  note=note)  # fmt: skip


def speed(check: Check) -> Iterator[Row]:
    """Steps and images at published sizes, as shares of a large product's rate."""
    side = gpu.PRODUCT if check.gpu else 64
    rate = gpu.matmul_rate(check.device, side)
    yield Row("speed", f"a bfloat16 product of {side}", MEASURED, rate / 1e12, "TFLOP/s")
    few = 8 if check.gpu else 2
    step = gpu.Case(check.base, gpu.STEP, check.edge, checkpointing=True)
    image = replace(step, work=gpu.IMAGE, steps=few)
    cases = [step, image]
    if check.gpu:
        large = [replace(step, base="qwen-image"), replace(image, base="qwen-image", steps=10)]
        cases = [*large, step, replace(step, checkpointing=False), image]
    for case in cases:
        try:
            found = gpu.measure(case, check.device, repeats=3)
        except torch.OutOfMemoryError:
            yield Row("speed", str(case), SKIPPED, note="does not fit")
            continue
        finally:
            empty(check.device)
            torch._dynamo.reset()
        _, _, peak, operations, share = found.cells(case, rate)
        note = f"{peak}, {operations} TFLOP/s, {share} of the product's rate"
        yield Row("speed", str(case), MEASURED, found.seconds * 1e3, "ms", note=note)
