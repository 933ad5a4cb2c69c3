"""Parts of `lab.benchmarks.gpu_check`: images and steps on quantized bases."""

import math
from collections.abc import Iterator, Sequence
from unittest.mock import patch

import torch

from families import quantization
from families.packed_weights import has_float8_products
from families.quantization import usable
from inference.acceleration import compile_blocks
from lab.benchmarks import gpu
from lab.benchmarks.gpu_check_rows import SKIPPED, Check, Row, empty
from trainer.memory.plan import Mode

STORED_STEP = 1.1  # goal: a compiled step on a quantized base, in ratio to 16 bits
FLOAT8_IMAGE = 0.6  # goal: seconds of an image in 8 steps with float8 products, on an H100
SIXTEEN_BITS, FLOAT8_PRODUCTS = "16 bits", "fp8, products"
IMAGE_KINDS = (SIXTEEN_BITS, FLOAT8_PRODUCTS, "int8")
OTHER_KINDS = ("nf4", "fp8, dequantized")


def images(check: Check) -> Iterator[Row]:
    """Compiled images: 16 bits, fp8 with float8 products, int8; with --full nf4 and plain fp8."""
    few = 8 if check.gpu else 2
    case = gpu.Case(check.base, gpu.IMAGE, check.edge, steps=few)
    kinds = IMAGE_KINDS if check.quick else (*IMAGE_KINDS, *OTHER_KINDS)
    yield from _compared(check, "images", f"an image in {few} steps", case, kinds)


def quantized(check: Check) -> Iterator[Row]:
    """Compiled steps on a quantized base, in ratio to 16 bits."""
    for again in (False, True):
        case = gpu.Case(check.base, gpu.STEP, check.edge, checkpointing=again)
        what = f"a step, activations {'recomputed' if again else 'kept'}"
        yield from _compared(check, "quantized", what, case, (*IMAGE_KINDS, *OTHER_KINDS))


def _compared(
    check: Check, part: str, what: str, case: gpu.Case, kinds: Sequence[str]
) -> Iterator[Row]:
    """One kind of work on each kind of base; the first one is in 16 bits."""
    unquantized = math.nan
    for kind in kinds:
        name = f"{what}: {kind}"
        try:
            found, why = _quantized(check, case, kind)
        except torch.OutOfMemoryError:
            found, why = None, "does not fit"
        empty(check.device)
        torch._dynamo.reset()
        if found is None:
            yield Row(part, name, SKIPPED, note=why)
            continue
        if kind == SIXTEEN_BITS:
            unquantized = found.seconds
        ratio, good = found.seconds / unquantized, True
        if case.work == gpu.STEP and kind != SIXTEEN_BITS:
            good = ratio <= STORED_STEP
        planned = None
        if case.work == gpu.IMAGE and kind == FLOAT8_PRODUCTS:
            good, planned = found.seconds <= FLOAT8_IMAGE, FLOAT8_IMAGE * 1e3
        note = f"{ratio:.2f} of 16 bits, peak {found.peak / 1e9:.1f} GB"
        yield Row(part, name, check.state(good), found.seconds * 1e3, "ms", planned, note)


def _quantized(check: Check, case: gpu.Case, kind: str) -> tuple[gpu.Measured | None, str]:
    """Time and peak memory of a compiled step or image, or why it is not measured."""
    stored = "none" if kind == SIXTEEN_BITS else kind.partition(",")[0]
    products = kind == FLOAT8_PRODUCTS
    if stored not in ("none", *usable(check.device)):
        return None, f"{stored} cannot run here"
    if products and not has_float8_products(check.device):
        return None, "no products in float8 here"
    with patch.object(quantization, "has_float8_products", lambda _: products):
        family = gpu.random_base(case.base, check.device, Mode(stored))
    make = gpu.generation if case.work == gpu.IMAGE else gpu.training_step
    work = make(family, case)
    compile_blocks(family.transformer, check.backend)
    gpu.reset_peak(check.device)
    seconds = gpu.seconds(work, check.device, 3)
    return gpu.Measured(seconds, gpu.peak_memory(check.device)), ""
