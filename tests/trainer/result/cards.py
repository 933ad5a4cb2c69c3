"""What tests of model cards share."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

PROMPT, WORD = "a photo of <zwx> on a beach, <zwx>", "<zwx>"

Finished = Callable[..., Path]


def code_of(card: str) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def generated_by_us(weights: Path, *changes: dict[str, Any]) -> list[Image.Image]:
    """The sample's picture, once for each of the changes to its request."""
    from inference.engine import Engine
    from inference.request import Request

    engine = Engine(torch.device("cpu"), torch.float32)
    archive = engine.read(weights)
    request = {"prompt": PROMPT, "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}
    return [engine.generate(Request(**(request | change)), archive)[0] for change in changes]


def difference(one: Image.Image, other: Image.Image) -> int:
    """Of the levels of two pictures, the largest."""
    pixels = [
        torch.frombuffer(bytearray(each.convert("RGB").tobytes()), dtype=torch.uint8).int()
        for each in (one, other)
    ]
    return int((pixels[0] - pixels[1]).abs().max())
