"""Part of `lab.benchmarks.gpu_check`: changing the LoRA of an unquantized base."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from unittest.mock import patch

import psutil
import torch
from torch import Tensor

from adapters import merging, original_weights
from adapters.merging import LoraMerger
from families.family import Family
from families.loading import default_device
from families.pinned import pinned
from lab.benchmarks import gpu
from lab.benchmarks.gpu_check_rows import (
    FAILED,
    MEASURED,
    PASSED,
    SKIPPED,
    Check,
    Row,
    empty,
)

CHANGE = {"z-image-turbo": 0.025, "qwen-image": 0.060}  # goals: seconds of a change
PEAK_LIMIT = 0.05  # of the counted memory
ULPS = 1.0  # a merge in one product may be rounded to the other neighbour, never further
PINNED = 5 * 2**28  # bytes: 1.25 GiB, which PyTorch's allocator would round to 2
MANTISSA = 8  # bits of bfloat16, the leading one included


def lora(check: Check) -> Iterator[Row]:
    """Changes of the LoRA: time, peak memory, rounding, the exact way back, pinned memory."""
    if check.gpu:
        default_device()  # float32 products without TF32, as in the product
    with ExitStack() as fused:
        if not check.gpu:  # merge on the CPU as on a GPU
            fused.enter_context(patch.object(merging, "fuses", lambda _: True))
        yield from _change(check, check.base)
        family = gpu.random_base(check.base, check.device)
        yield from _rounding(check, family)
        del family
        empty(check.device)
    yield from _pinned(check)
    if check.gpu and not check.quick:
        yield from _change(check, "qwen-image")


def _change(check: Check, base: str) -> Iterator[Row]:
    """Another LoRA: seconds, and the peak of the memory with that of the counted weights."""
    family = gpu.random_base(base, check.device)
    layers = dict(family.transformer.named_modules())
    names = family.lora_targets()
    weights = sum(each.nbytes for each in family.transformer.parameters())
    copies = sum(layers[name].weight.nbytes for name in names)
    gpu.reset_peak(check.device)
    try:
        seconds = gpu.seconds(gpu.lora_change(family), check.device, 5)
    except torch.OutOfMemoryError:
        yield Row("lora", f"{base}: another LoRA", SKIPPED, note="does not fit")
        return
    what, goal = f"{base}: another LoRA of rank {gpu.RANK}", CHANGE.get(base)
    state = check.state(goal is None or seconds <= goal)
    planned = None if goal is None else goal * 1e3
    yield Row("lora", what, state, seconds * 1e3, "ms", planned, f"{len(names)} layers")
    peak, counted = gpu.peak_memory(check.device), weights + copies
    state = check.state(abs(peak / counted - 1) <= PEAK_LIMIT)
    note = f"counted: weights {weights / 1e9:.1f}, copies of the original ones {copies / 1e9:.1f}"
    yield Row("lora", f"{base}: its peak memory", state, peak / 1e9, "GB", counted / 1e9, note)
    del family, layers
    empty(check.device)
    if not check.gpu or check.quick or base != check.base:
        return
    family = gpu.random_base(base, check.device)
    none_free = patch.object(original_weights, "_free", _only_cpu_memory)
    gpu.reset_peak(check.device)
    with none_free:
        seconds = gpu.seconds(gpu.lora_change(family), check.device, 1)
    peak = gpu.peak_memory(check.device)
    yield Row("lora", f"{base}: another LoRA, original weights in CPU memory", MEASURED,
              seconds * 1e3, "ms", note=f"GPU memory {peak / 1e9:.1f} GB")  # fmt: skip
    del family
    empty(check.device)


def _only_cpu_memory(device: torch.device) -> int:
    """In place of the free memory: none on the GPU."""
    return 0 if device.type == "cuda" else 1 << 50


@torch.no_grad()
def _rounding(check: Check, family: Family) -> Iterator[Row]:
    """A merge in one product beside the float32 sum that is rounded once, and its way back."""
    factors = gpu.random_lora(family, 0)
    layers = dict(family.transformer.named_modules())
    names = list(factors)[:: 1 if check.gpu and not check.quick else 8]
    before = {name: layers[name].weight.clone() for name in names}
    merger = LoraMerger(family.transformer)
    merger.apply([({name: factors[name] for name in names}, 0.8)])
    others, total, worst, lost = 0, 0, 0.0, 0
    for name, original in before.items():
        down, up = (each.to(check.device) for each in factors[name])
        wanted = original.float().addmm_(up, down, alpha=0.8).bfloat16()
        merged = layers[name].weight
        others += int((merged != wanted).sum())
        lost += int((merged != original).sum() == 0)
        total += merged.numel()
        worst = max(worst, float(_ulps(merged, wanted, original).max()))
    note = f"{others} of {total} weights differ, in {len(names)} layers"
    state = PASSED if worst <= ULPS and not lost else FAILED
    yield Row("lora", "one product differs from the float32 sum by", state, worst, "ulp", ULPS,
              note)  # fmt: skip
    merger.restore()
    same = all(torch.equal(layers[name].weight, weight) for name, weight in before.items())
    yield Row("lora", "original weights are restored exactly", PASSED if same else FAILED)


def _ulps(one: Tensor, other: Tensor, original: Tensor) -> Tensor:
    """|one - other| in units of the last place of the larger of `other` and `original`.

    Where both are far smaller than the change, a sum's error may be many of its own units.
    """
    largest = torch.maximum(other.abs(), original.abs()).float()
    exponent = torch.frexp(largest).exponent - MANTISSA
    return (one.float() - other.float()).abs() / torch.ldexp(torch.ones_like(largest), exponent)


def _pinned(check: Check) -> Iterator[Row]:
    """Pinned memory of the driver (`cudaHostRegister`), and its rate to the GPU."""
    if not check.gpu:
        yield Row("lora", "pinned CPU memory", SKIPPED, note="needs a GPU")
        return
    values = torch.zeros(PINNED, dtype=torch.uint8)
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    kept = pinned(values)
    seconds = time.perf_counter() - began
    grown = process.memory_info().rss - before
    good = kept.is_pinned() and grown < 1.2 * PINNED
    note = f"{seconds:.2f} s for {PINNED / 1e9:.2f} GB, which took {grown / 1e9:.2f} GB"
    yield Row("lora", "pinned CPU memory", PASSED if good else FAILED, note=note)
    there = torch.empty_like(kept, device=check.device)
    for what, copied in (
        ("CPU to GPU", _copying(there, kept)),
        ("CPU to GPU, not pinned", _copying(there, values)),
        ("GPU to CPU", _copying(kept, there)),
    ):
        rate = PINNED / gpu.seconds(copied, check.device, 3) / 1e9
        yield Row("lora", f"copies from {what}", MEASURED, rate, "GB/s")


def _copying(target: Tensor, source: Tensor) -> Callable[[], object]:
    return lambda: target.copy_(source, non_blocking=True)
