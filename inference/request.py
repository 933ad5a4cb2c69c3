"""A request as the user gives it, and as it is drawn."""

import logging
import secrets
from dataclasses import dataclass

from families.bases import Base

log = logging.getLogger(__name__)

ASPECT_RATIOS = ("1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3", "4:5", "5:4", "21:9", "9:21")
RANGES = {  # the Cog face states the same
    "lora_scale": (-3, 3),
    "width": (32, 2048),
    "height": (32, 2048),
    "num_outputs": (1, 8),
    "num_inference_steps": (1, 200),
    "guidance_scale": (1, 20),
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw. None stands for what suits the base."""

    prompt: str
    negative_prompt: str = ""
    lora_scale: float = 1.0
    width: int | None = None  # pixels
    height: int | None = None
    aspect_ratio: str = "1:1"  # at the base's own resolution, without width and height
    num_outputs: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None  # 1 is off
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt or not self.prompt.strip():
            raise ValueError("prompt is empty; say what to draw")
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together; give both or neither")
        if self.aspect_ratio not in ASPECT_RATIOS:
            known = ", ".join(ASPECT_RATIOS)
            raise ValueError(f"aspect_ratio {self.aspect_ratio!r} is not one of {known}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value:g}; it lies between {low:g} and {high:g}")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A request with every value settled for one base."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seeds: tuple[int, ...]  # one per picture


def settle(request: Request, base: Base, multiple: int) -> Drawing:
    """Fills in what the request left out; sizes are rounded to `multiple` pixels."""
    if request.width is not None and request.height is not None:
        width, height = float(request.width), float(request.height)
    else:
        across, down = map(int, request.aspect_ratio.split(":"))
        width = base.default_resolution * (across / down) ** 0.5
        height = base.default_resolution * (down / across) ** 0.5
    rounded = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
    if request.width is not None and (request.width, request.height) != tuple(rounded):
        log.warning(
            "%dx%d is drawn as %dx%d: sides are multiples of %d for %s",
            *(request.width, request.height, *rounded, multiple, base.name),
        )
    guidance = base.guidance_scale if request.guidance_scale is None else request.guidance_scale
    if request.negative_prompt and guidance <= 1:
        log.warning("negative_prompt has no effect: guidance_scale is %g, which is off", guidance)
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    return Drawing(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=rounded[0],
        height=rounded[1],
        steps=base.inference_steps
        if request.num_inference_steps is None
        else request.num_inference_steps,
        guidance_scale=guidance,
        seeds=tuple(seed + picture for picture in range(request.num_outputs)),
    )
