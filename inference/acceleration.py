"""What makes a transformer faster on a GPU and changes nothing but rounding.

Compiled by its repeated blocks (diffusers' regional compilation): one block is compiled once and
serves all its copies. LoRAs are merged into the same storage, so applying or removing one
recompiles nothing. `$COMPILE=0` leaves the transformer as it is. Where compiling or cuDNN's
attention fails, the transformer goes on without them.
"""

import logging
import os
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers.models.attention_dispatch import attention_backend

from families.family import Family
from families.out_of_memory import is_out_of_memory
from inference.generation import generate_once

log = logging.getLogger(__name__)

Result = TypeVar("Result")

USUAL_RATIOS = ("1:1", "16:9", "9:16")  # the second size makes the compiled block take any size
# Blocks with and without a mask, at fixed and at any size, with and without gradients' guards.
RECOMPILE_LIMIT = 64
# "up to 75 % over FlashAttention 2 on H100 or newer" (PyTorch 2.5 release notes).
HOPPER, HOPPER_ATTENTION = (9, 0), "_native_cudnn"
NATIVE_ATTENTION = "native"  # PyTorch chooses
_PREPARED = "_zeroprior_acceleration"  # the attribute that lists what a transformer has


def wanted(device: torch.device) -> bool:
    """Whether a transformer on this device is to be accelerated."""
    asked = os.environ.get("COMPILE", "1").lower() not in ("0", "false", "no", "off")
    return device.type == "cuda" and asked


def wanted_in_training(device: torch.device) -> bool:
    """The same of a training, which compiles on a CPU too where `$COMPILE=1` asks for it."""
    return wanted(device) or os.environ.get("COMPILE", "").lower() in ("1", "true", "yes", "on")


def accelerate(family: Family) -> None:
    """Chooses the attention, compiles the blocks, and draws once at each of the usual sizes."""
    transformer = family.transformer
    if torch.cuda.get_device_capability(family.device) >= HOPPER:
        use_attention(transformer, HOPPER_ATTENTION)
        with_fallback(transformer, lambda: _generate_usual(family, USUAL_RATIOS[:1]))
    log.info("compiling %s for the usual sizes", family.base.name)
    compile_blocks(transformer)
    with_fallback(transformer, lambda: _generate_usual(family, USUAL_RATIOS))


def use_attention(transformer: Any, backend: str) -> None:
    """Has this transformer, and no other, compute its attention by a backend of diffusers."""
    with attention_backend():  # which brings back the process's own choice when it ends
        transformer.set_attention_backend(backend)
    _note(transformer, "attention", backend != NATIVE_ATTENTION)


def compile_blocks(transformer: Any, backend: str = "inductor") -> None:
    """Has the transformer's repeated blocks compiled when they are next run."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    transformer.compile_repeated_blocks(backend=backend)
    _note(transformer, "compiled", True)


def is_compiled(transformer: Any) -> bool:
    """Whether its blocks are compiled, or will be when they are next run."""
    return "compiled" in getattr(transformer, _PREPARED, ())


def with_fallback(
    transformer: Any, work: Callable[[], Result], reset: Callable[[], None] | None = None
) -> Result:
    """The result of `work`, which runs the transformer.

    If it fails on an accelerated transformer, it is done once more, after `reset`, with plain
    blocks and PyTorch's own attention. If that works, the transformer stays so, and one warning
    says why. If it does not, the acceleration was not the reason, and the first error is raised.
    Out of memory is raised as it is.
    """
    had = set(getattr(transformer, _PREPARED, ()))
    try:
        return work()
    except Exception as error:
        if not had or is_out_of_memory(error):
            raise
        first = error
    _let_go(first)
    compiled = _without_acceleration(transformer)
    if reset is not None:
        reset()
    try:
        result = work()
    except BaseException as second:
        if not isinstance(second, Exception) or is_out_of_memory(second):
            raise
        for block, call in compiled.items():
            block._compiled_call_impl = call
        if "attention" in had:
            use_attention(transformer, HOPPER_ATTENTION)
        _note(transformer, "compiled", "compiled" in had)
        raise first from None
    names = {"compiled": "compiled blocks", "attention": "cuDNN attention"}
    log.warning(
        "%s failed (%s); going on without, which is slower",
        " and ".join(names[each] for each in sorted(had, reverse=True)),
        reason(first),
    )
    return result


def reason(error: BaseException) -> str:
    """The first line that says something, of the error that led to all others."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _let_go(error: BaseException | None) -> None:
    """Empties the frames that an error came through, which hold what a step has computed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _without_acceleration(transformer: Any) -> dict[Any, Any]:
    """Plain blocks and native attention; the compiled calls that were there, by block."""
    compiled = {
        block: block._compiled_call_impl
        for block in transformer.modules()
        if getattr(block, "_compiled_call_impl", None) is not None
    }
    for block in compiled:
        block._compiled_call_impl = None
    _note(transformer, "compiled", False)
    if "attention" in getattr(transformer, _PREPARED, ()):
        use_attention(transformer, NATIVE_ATTENTION)
    return compiled


def _note(transformer: Any, what: str, there: bool) -> None:
    """Writes down what the transformer has."""
    found = set(getattr(transformer, _PREPARED, ())) - {what}
    setattr(transformer, _PREPARED, found | ({what} if there else set()))


def _generate_usual(family: Family, ratios: tuple[str, ...]) -> None:
    base, multiple = family.base, family.resolution_multiple
    for ratio in ratios:
        across, down = map(int, ratio.split(":"))
        sides = [
            round(base.default_resolution * (one / other) ** 0.5 / multiple) * multiple
            for one, other in ((across, down), (down, across))
        ]
        generate_once(family, sides[0], sides[1], base.guidance_scale)
