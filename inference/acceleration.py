"""What makes a transformer faster on a GPU and changes nothing but rounding.

Compiled by its repeated blocks (diffusers' regional compilation): one block is compiled once and
serves all its copies. LoRAs are merged into the same storage, so laying one over or taking it off
recompiles nothing. `$COMPILE=0` leaves the transformer as it is.
"""

import logging
import os
from typing import Any

import torch

from families.family import Family
from inference.drawing import draw_once

log = logging.getLogger(__name__)

USUAL_RATIOS = ("1:1", "16:9", "9:16")  # the second size makes the compiled block take any size
# Blocks with and without a mask, at fixed and at any size, with and without gradients' guards.
RECOMPILE_LIMIT = 64
# "up to 75 % over FlashAttention 2 on H100 or newer" (PyTorch 2.5 release notes); what it cannot
# do it refuses, and the native choice is taken instead.
HOPPER, HOPPER_ATTENTION = (9, 0), "_native_cudnn"


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
        transformer.set_attention_backend(HOPPER_ATTENTION)
        try:
            _draw_usual(family, USUAL_RATIOS[:1])
            log.info("attention by cuDNN")
        except RuntimeError as error:
            transformer.set_attention_backend("native")
            log.warning("attention by cuDNN is not to be had (%s); PyTorch chooses", error)
    log.info("compiling %s for the usual sizes", family.base.name)
    compile_blocks(transformer)
    _draw_usual(family, USUAL_RATIOS)


def compile_blocks(transformer: Any, backend: str = "inductor") -> None:
    """Has the transformer's repeated blocks compiled when they are next run."""
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    transformer.compile_repeated_blocks(backend=backend)


def _draw_usual(family: Family, ratios: tuple[str, ...]) -> None:
    base, multiple = family.base, family.resolution_multiple
    for ratio in ratios:
        across, down = map(int, ratio.split(":"))
        sides = [
            round(base.default_resolution * (one / other) ** 0.5 / multiple) * multiple
            for one, other in ((across, down), (down, across))
        ]
        draw_once(family, sides[0], sides[1], base.guidance_scale)
