"""A request as the user gives it, and with every value filled in for one base model."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from PIL import Image

from families.base import Base
from families.few_steps import FewStepLora
from families.tokens import check_unicode

log = logging.getLogger(__name__)

ASPECT_RATIOS = ("1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3", "4:5", "5:4", "21:9", "9:21")
CUSTOM = "custom"  # what other services call a size given by width and height
LONGEST = 3.0  # a picture that follows an image is at most this many times longer than wide
DEFAULT_STRENGTH = 0.8
FORMATS = ("webp", "jpg", "png")  # of image files; the first is the default
QUALITY, QUALITIES = 90, (1, 100)  # of webp and jpg files: the default, and the bounds
# The bounds of every number, as in predict.py and docs/inference.md; a test compares them.
RANGES: dict[str, tuple[float, float]] = {
    # guidance_scale is from 0 in predict.py, so that our message is the one that is read.
    "lora_scale": (-3, 3),
    "extra_lora_scale": (-3, 3),
    "prompt_strength": (0, 1),
    "width": (32, 2048),
    "height": (32, 2048),
    "num_outputs": (1, 8),
    "num_inference_steps": (1, 200),
    "guidance_scale": (1, 20),
    "shift": (0, 20),
    "seed": (0, 2**63 - 1),
}
HINTS = {  # after a message about a value out of range
    "lora_scale": "; 1 is as trained",
    "extra_lora_scale": "; 1 is as trained",
    "num_outputs": "; send several requests for more",
    "num_inference_steps": "; leave it out for the model's own number",
    "guidance_scale": "; 1 is off",
    "shift": "; 0 is the model's own schedule",
    "width": "; enlarge the image afterwards for more",
    "height": "; enlarge the image afterwards for more",
}
# Characters, the same as in predict.py. The text encoders read 512 tokens, about 2,500 characters.
LENGTHS: dict[str, int] = {
    "prompt": 10_000,
    "negative_prompt": 10_000,
    # Addresses, or data URLs, which can be as long as Cog takes a request: 100 MiB.
    "replicate_weights": 100 << 20,
    "lora_weights": 100 << 20,
    "extra_lora": 100 << 20,
    "hf_api_token": 1_000,
}
# What one request to a server may cost: passes of one image of the base's own resolution through
# the transformer. 8 images of 50 guided steps are 800, 2 minutes of Qwen-Image on an H100.
MOST_PASSES = 2_000


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw. None stands for what suits the base."""

    prompt: str
    negative_prompt: str = ""
    lora_scale: float = 1.0
    extra_lora_scale: float | None = None  # of the second LoRA; None is 1
    image: Image.Image | None = None  # to start from
    prompt_strength: float | None = None  # how much of the image is drawn anew; None is 0.8
    width: int | None = None  # pixels
    height: int | None = None
    aspect_ratio: str | None = None  # None: the image's, else 1:1; at the base's own resolution
    num_outputs: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None  # 1 is off
    shift: float | None = None  # static shift of the sigmas; 0: the model's own schedule
    go_fast: bool = False  # guidance in the first half of the steps only
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name) or ""
            if not isinstance(text, str):
                raise ValueError(f"{name} is {repr(text)[:80]}; it must be text")
            check_unicode(name, text)
            check_length(name, text, LENGTHS[name])
        if not self.prompt or not self.prompt.strip():
            raise ValueError("prompt is empty; say what to draw")
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together; give both or neither")
        if self.aspect_ratio not in (None, CUSTOM, *ASPECT_RATIOS):
            known = ", ".join((*ASPECT_RATIOS, CUSTOM))
            raise ValueError(f"aspect_ratio {self.aspect_ratio!r} is not one of {known}")
        if self.aspect_ratio == CUSTOM and self.width is None:
            raise ValueError("aspect_ratio custom wants width and height")
        if self.prompt_strength is not None and self.image is None:
            raise ValueError("prompt_strength needs an image")
        scale = self.guidance_scale
        if isinstance(scale, int | float) and not isinstance(scale, bool) and scale < 1:
            raise ValueError(
                f"guidance_scale is {_digits(scale)}; 1 is off, so give 1 to turn guidance off "
                "(some programs count from 0: their 0 is 1 here)"
            )
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and (fault := out_of_range(name, value, low, high, type(self))):
                raise ValueError(fault + HINTS.get(name, ""))


def out_of_range(
    name: str, value: object, low: float, high: float, of: type | None = None
) -> str | None:
    """What is wrong with a number, with all digits of whole ones; None where nothing is.

    `of` is the dataclass in which the annotation of that name says whether fractions are allowed.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{name} is {value!r}, not a number"
    wanted = of.__annotations__[name] if of else float
    if isinstance(value, float) and float not in (wanted, *get_args(wanted)):
        return f"{name} is {value!r}; it must be a whole number"
    if low <= value <= high:
        return None
    return f"{name} is {_digits(value)}; it must be between {_digits(low)} and {_digits(high)}"


def _digits(value: float) -> str:
    if isinstance(value, int):  # Python itself refuses to print more than 4,300 digits
        return str(value) if value.bit_length() < 1000 else "a number beyond 1000 bits"
    return f"{value:g}"


def check_length(name: str, text: str, most: int) -> None:
    """Raises ValueError for a text of more than `most` characters."""
    if len(text) > most:
        raise ValueError(f"{name} has {len(text):,} characters; at most {most:,} are accepted")


def check_file(file_format: str, quality: object) -> None:
    """Raises ValueError for an image file that cannot be asked for."""
    if file_format not in FORMATS:
        raise ValueError(f"output_format {file_format!r} is not one of {', '.join(FORMATS)}")
    if (fault := out_of_range("output_quality", quality, *QUALITIES)) is not None:
        raise ValueError(fault)


def check_size(request: Request, base: Base) -> None:
    """Raises ValueError for an image that is larger than the base generates."""
    width, height = map(round, wanted_size(request, base.default_resolution))
    most = base.largest_resolution
    if width * height > most**2:
        raise ValueError(
            f"{width}x{height} is too large for {base.name}, which generates at most "
            f"{most}x{most} or as many pixels ({most**2:,}) in another shape"
        )


def work(request: Request, base: Base, few_steps: FewStepLora | None = None) -> float:
    """What a request costs: passes of an image of the base's own resolution."""
    width, height = map(round, wanted_size(request, base.default_resolution))
    return _passes(request, base, few_steps) * width * height / base.default_resolution**2


def _passes(request: Request, base: Base, few_steps: FewStepLora | None) -> int:
    steps, guidance = _steps_and_guidance(request, base, few_steps)
    return request.num_outputs * steps * (2 if guidance > 1 else 1)


def check_work(request: Request, base: Base, few_steps: FewStepLora | None = None) -> None:
    """Raises ValueError for a request that would keep a server busy for too long."""
    cost = work(request, base, few_steps)
    if cost > MOST_PASSES:
        width, height = map(round, wanted_size(request, base.default_resolution))
        steps, guidance = _steps_and_guidance(request, base, few_steps)
        passes = _passes(request, base, few_steps)
        raise ValueError(
            f"{request.num_outputs} images of {width}x{height} in {steps} steps"
            f"{' with guidance, which doubles them,' if guidance > 1 else ''} are too much for one "
            f"request: {passes:,} steps, where {base.name} does at most "
            f"{int(MOST_PASSES * passes / cost):,} at this size; lower num_outputs, "
            "num_inference_steps or the size"
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request with every value settled for one base."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seeds: tuple[int, ...]  # one per picture
    go_fast: bool = False
    prompt_strength: float | None = None  # None: without an image
    shift: float | None = None  # of `Family.sigmas`; None: the model's own schedule

    @property
    def first_step(self) -> int:
        """The step to begin with; those before are skipped for the sake of the image.

        As the stock image-to-image pipelines count: of N steps, N * strength are drawn, rounded up.
        """
        if self.prompt_strength is None:
            return 0
        return int(self.steps - self.steps * self.prompt_strength)


def settle(
    request: Request, base: Base, multiple: int, few_steps: FewStepLora | None = None
) -> ResolvedRequest:
    """Fills in what the request left out; sizes are rounded to `multiple` pixels.

    A few-step LoRA has its makers' steps, guidance and schedule, which are used unless the request
    sets others. Raises ValueError for an image that is too large for the base.
    """
    check_size(request, base)
    width, height = wanted_size(request, base.default_resolution)
    rounded = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
    if request.width is not None and (request.width, request.height) != tuple(rounded):
        log.warning(
            "%dx%d is drawn as %dx%d: sides are multiples of %d for %s",
            *(request.width, request.height, *rounded, multiple, base.name),
        )
    steps, guidance = _steps_and_guidance(request, base, few_steps)
    shift = few_steps.shift if few_steps and request.shift is None else request.shift or None
    _warn_of_settings(base, few_steps, steps, guidance, shift, rounded)
    if request.negative_prompt and guidance <= 1:
        log.warning("negative_prompt has no effect: guidance_scale is %g, which is off", guidance)
    if request.go_fast and guidance <= 1:
        log.warning("go_fast has no effect: it saves guidance, which is off")
    strength = request.prompt_strength
    if request.image is not None and strength is None:
        strength = DEFAULT_STRENGTH
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    if strength == 0:
        log.warning("prompt_strength is 0: nothing is drawn and the image comes back as it was")
    return ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=rounded[0],
        height=rounded[1],
        steps=steps,
        guidance_scale=guidance,
        seeds=tuple(seed + picture for picture in range(request.num_outputs)),
        go_fast=request.go_fast and guidance > 1,
        prompt_strength=strength,
        shift=shift,
    )


def _steps_and_guidance(
    request: Request, base: Base, few_steps: FewStepLora | None
) -> tuple[int, float]:
    """As the request says, else as the few-step LoRA's makers do, else the base's own."""
    steps, guidance = request.num_inference_steps, request.guidance_scale
    if steps is None:
        steps = few_steps.steps if few_steps else base.inference_steps
    return steps, (few_steps or base).guidance_scale if guidance is None else guidance


def _warn_of_settings(
    base: Base,
    few_steps: FewStepLora | None,
    steps: int,
    guidance: float,
    shift: float | None,
    size: Sequence[int],
) -> None:
    """Logs what a few-step LoRA brings, and values that are allowed but wrong for the model."""
    if few_steps is not None:
        taken = f"{steps} steps, guidance {guidance:g}, {_schedule(shift)}"
        made = (
            f"{few_steps.steps} steps, guidance {few_steps.guidance_scale:g}, "
            f"{_schedule(few_steps.shift)}"
        )
        log.info("few-step LoRA %s: %s", few_steps.name, taken)
        if taken != made:
            log.warning("%s is made for %s; used: %s", few_steps.name, made, taken)
    elif base.distilled and guidance > 1:
        log.warning(
            "guidance_scale %g: %s is distilled to run without guidance; its own values are "
            "guidance_scale %g and %d steps. Guidance takes twice the time and burns the image",
            *(guidance, base.name, base.guidance_scale, base.inference_steps),
        )
    if few_steps is None and base.distilled and steps > 2 * base.inference_steps:
        log.warning(
            "num_inference_steps %d: %s is distilled to %d steps; more take longer and do not "
            "improve the image",
            *(steps, base.name, base.inference_steps),
        )
    if few_steps is None and not base.distilled and steps < base.inference_steps / 3:
        log.warning(
            "num_inference_steps %d: %s is made for %d steps; fewer give blurred images, unless a "
            "few-step LoRA is loaded",
            *(steps, base.name, base.inference_steps),
        )
    share = size[0] * size[1] / base.default_resolution**2
    if not 1 / 4 <= share <= 9 / 4:
        log.warning(
            "%dx%d is far from the %dx%d pixels that %s is made for; expect repeated or missing "
            "parts",
            *(*size, base.default_resolution, base.default_resolution, base.name),
        )


def _schedule(shift: float | None) -> str:
    return "the model's own schedule" if shift is None else f"shift {shift:g}"


def wanted_size(request: Request, resolution: int) -> tuple[float, float]:
    """Width and height before rounding; `resolution` is the base's own."""
    if request.width is not None and request.height is not None:
        return request.width, request.height
    if request.aspect_ratio is not None:
        across, down = map(int, request.aspect_ratio.split(":"))
        ratio = across / down
    elif request.image is not None:
        ratio = request.image.width / request.image.height
        ratio = min(max(ratio, 1 / LONGEST), LONGEST)
    else:
        ratio = 1.0
    return resolution * ratio**0.5, resolution * (1 / ratio) ** 0.5
