"""Makes a transformer faster on a GPU: compiled blocks and cuDNN attention.

The repeated blocks are compiled (diffusers' regional compilation): one block is compiled once for
all its copies. LoRAs are merged into the same storage, so applying or removing one does not
recompile. `$COMPILE=0` turns compilation off. If compilation or cuDNN attention fails, the
transformer runs without them. Results differ only by rounding. Compiled code is kept on disk for
later processes (`$TORCHINDUCTOR_CACHE_DIR`).
"""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch._dynamo.exc import TorchDynamoException

from families.device import empty_cache
from families.family import Family
from families.loading import default_device
from families.out_of_memory import free_frames, is_out_of_memory
from inference.generation import generate_once

log = logging.getLogger(__name__)

Result = TypeVar("Result")

USUAL_RATIOS = ("1:1", "16:9", "9:16")  # at the second size, shapes become dynamic
# Blocks with and without a mask, at fixed and dynamic sizes, with and without gradients.
RECOMPILE_LIMIT = 64
CACHE_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
# "up to 75 % over FlashAttention 2 on H100 or newer" (PyTorch 2.5 release notes).
HOPPER, HOPPER_ATTENTION = (9, 0), "_native_cudnn"
NATIVE_ATTENTION = "native"  # PyTorch's default
_PREPARED = "_zeroprior_acceleration"  # attribute of a transformer: accelerations in use


def wanted(device: torch.device) -> bool:
    """Whether to accelerate a transformer on this device."""
    asked = os.environ.get("COMPILE", "1").lower() not in ("0", "false", "no", "off")
    return device.type == "cuda" and asked


def wanted_in_training(device: torch.device) -> bool:
    """The same for training, which also compiles on a CPU if `$COMPILE=1`."""
    return wanted(device) or os.environ.get("COMPILE", "").lower() in ("1", "true", "yes", "on")


def accelerate(family: Family) -> None:
    """Chooses the attention, compiles the blocks, and runs one step at each usual size.

    If a size does not fit into memory, requests of smaller sizes still work: that is a warning.
    """
    try:
        _accelerate(family)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        free_frames(error)
        said = reason(error)
        log.warning(
            "not prepared for the usual sizes, out of memory (%s): the first request of each size "
            "takes longer, and large images may not fit",
            said,
        )
        empty_cache(family.device)


def _accelerate(family: Family) -> None:
    transformer = family.transformer
    if torch.cuda.get_device_capability(family.device) >= HOPPER:
        use_attention(transformer, HOPPER_ATTENTION)
        with_fallback(transformer, lambda: _generate_usual(family, USUAL_RATIOS[:1]))
    log.info("compiling %s for the usual sizes", family.base.name)
    compile_blocks(transformer)
    with_fallback(transformer, lambda: _generate_usual(family, USUAL_RATIOS))


def use_attention(transformer: Any, backend: str) -> None:
    """Sets the attention backend of diffusers for this transformer only."""
    with attention_backend():  # restores the process-wide backend at its end
        transformer.set_attention_backend(backend)
    _note(transformer, "attention", backend != NATIVE_ATTENTION)


def compile_blocks(
    transformer: Any, backend: str = "inductor", several_sizes: bool = False
) -> None:
    """Compiles the transformer's repeated blocks at their next call.

    By default they are compiled for one size, and for all sizes at the second one. With
    `several_sizes` they are compiled for all sizes at once, which saves the first compilation.
    """
    _prepare_compiler()
    transformer.compile_repeated_blocks(backend=backend, dynamic=several_sizes or None)
    _note(transformer, "compiled", True)


def compile_text_encoder(family: Family, backend: str = "inductor") -> None:
    """Compiles the layers of the family's text encoder at their next call, for all lengths.

    Call it without a cache of keys and values from then on (`families.prefix`): the cache is
    indexed by the layer's number, so every layer would be compiled separately.
    """
    _prepare_compiler()
    for layer in family.text_encoder.get_submodule(family.text_trunk):
        layer.compile(backend=backend, dynamic=True)
    _note(family.text_encoder, "compiled", True)


@functools.cache
def _prepare_compiler() -> None:
    """Sets the compiler's limits and the folder where it keeps its results for later processes.

    PyTorch's default is a temporary folder.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = os.environ.get(CACHE_FOLDER) or str(caches / "zeroprior" / "compiled")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        log.warning("compiled code is not kept for later runs (%s); set $%s", error, CACHE_FOLDER)
        return
    os.environ[CACHE_FOLDER] = folder
    log.info("compiled code is kept in %s ($%s)", folder, CACHE_FOLDER)


def is_compiled(model: Any) -> bool:
    """Whether a model's blocks are compiled, or will be at their next call."""
    return "compiled" in _noted(model)


def with_fallback(
    transformer: Any,
    work: Callable[[], Result],
    reset: Callable[[], None] | None = None,
    text_encoders: Sequence[Any] = (),
) -> Result:
    """The result of `work`, which runs the transformer and possibly compiled text encoders.

    If it fails on accelerated models, it is run again, after `reset`, without compiled blocks and
    with PyTorch's attention. If that works, the models stay like this, with one warning. If not,
    the acceleration was not the cause, and the first error is raised. An out-of-memory error is
    raised at once, unless it is of the compilation itself, which needs memory that plain blocks do
    not.
    """
    models = (transformer, *text_encoders)
    noted = [(model, _noted(model)) for model in models]
    had = set[str]().union(*(names for _, names in noted))
    try:
        return work()
    except Exception as error:
        if not had or (is_out_of_memory(error) and not _in_compilation(error)):
            raise
        first = error
    free_frames(first)
    if full := is_out_of_memory(first):
        empty_cache(default_device())
    compiled = {block: call for each in models for block, call in _without_acceleration(each)}
    if reset is not None:
        reset()
    try:
        result = work()
    except BaseException as second:
        for block, call in compiled.items():
            block._compiled_call_impl = call
        if "attention" in had:
            use_attention(transformer, HOPPER_ATTENTION)
        for model, names in noted:
            _note(model, "compiled", "compiled" in names)
        if full or not isinstance(second, Exception) or is_out_of_memory(second):
            raise
        raise first from None
    words = {"compiled": "compiled blocks", "attention": "cuDNN attention"}
    log.warning(
        "%s failed (%s); continuing without, which is slower",
        " and ".join(words[each] for each in sorted(had, reverse=True)),
        reason(first),
    )
    return result


def reason(error: BaseException) -> str:
    """The first non-empty line of the error that caused all others."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _in_compilation(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, was raised by the compiler."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, TorchDynamoException):
            return True
        error = error.__cause__ or error.__context__
    return False


def _without_acceleration(model: Any) -> list[tuple[Any, Any]]:
    """Sets plain blocks and native attention; returns the compiled blocks with their calls."""
    compiled = [
        (block, block._compiled_call_impl)
        for block in model.modules()
        if getattr(block, "_compiled_call_impl", None) is not None
    ]
    for block, _ in compiled:
        block._compiled_call_impl = None
    _note(model, "compiled", False)
    if "attention" in _noted(model):
        use_attention(model, NATIVE_ATTENTION)
    return compiled


def _noted(model: Any) -> set[str]:
    """The accelerations in use."""
    return set(getattr(model, _PREPARED, ()))


def _note(model: Any, what: str, there: bool) -> None:
    """Notes in the model's attribute that an acceleration is on or off."""
    setattr(model, _PREPARED, _noted(model) - {what} | ({what} if there else set()))


def _generate_usual(family: Family, ratios: tuple[str, ...]) -> None:
    base, multiple = family.base, family.resolution_multiple
    for ratio in ratios:
        across, down = map(int, ratio.split(":"))
        sides = [
            round(base.default_resolution * (one / other) ** 0.5 / multiple) * multiple
            for one, other in ((across, down), (down, across))
        ]
        generate_once(family, sides[0], sides[1], base.guidance_scale)
