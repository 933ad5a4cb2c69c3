"""Generation requests: as given by the user, and resolved for one base model."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from PIL import Image
from pydantic import InstanceOf, model_validator

from families.base import Base
from families.few_steps import FewStepLora
from inference.inputs import WITH_TOKEN, ApplyLora, GenerationInputs, SharedInputs

log = logging.getLogger(__name__)

BLACK_MASK = "mask is black everywhere, so nothing would be generated; paint that part white"

LONGEST = 3.0  # most extreme aspect ratio that is taken from an input image
DEFAULT_STRENGTH = 0.8
# Most compute of one request to a server, in transformer passes of one image of the base's default
# resolution. 8 images of 50 guided steps are 800: 2 minutes of Qwen-Image on an H100.
MOST_PASSES = 2_000


class Request(SharedInputs):
    """What to generate. None: the base model's default."""

    apply_lora: ApplyLora = WITH_TOKEN
    image: InstanceOf[Image.Image] | None = None  # to start from
    mask: InstanceOf[Image.Image] | None = None  # of the image; its white part is generated

    @model_validator(mode="after")
    def _of_one_size(self) -> Self:
        if self.mask is not None and self.image is not None and self.mask.size != self.image.size:
            mask, image = ("x".join(map(str, each.size)) for each in (self.mask, self.image))
            raise ValueError(f"mask is {mask}, but image is {image}; make both the same size")
        if self.mask is not None:  # what the crop cuts off is known with the base's sizes only
            levels = self.mask.convert("RGB").getextrema()
            if max(high for _, high in levels) < 128:  # type: ignore[misc, has-type]
                raise ValueError(BLACK_MASK)
        return self

    @classmethod
    def of(
        cls,
        inputs: GenerationInputs,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
    ) -> "Request":
        """The request of these inputs, with their image and mask already read."""
        shared = {name: getattr(inputs, name) for name in SharedInputs.model_fields}
        return cls(**shared, apply_lora=inputs.apply_lora, image=image, mask=mask)


def check_size(request: Request, base: Base) -> None:
    """Raises ValueError for an image that is too large for the base."""
    width, height = map(round, wanted_size(request, base.default_resolution))
    most = base.largest_resolution
    if width * height > most**2:
        raise ValueError(
            f"{width}x{height} is too large for {base.name}: at most {most}x{most}, or as many "
            f"pixels ({most**2:,}) at another aspect ratio"
        )


def work(request: Request, base: Base, few_steps: FewStepLora | None = None) -> float:
    """Compute of a request, in passes of an image of the base's default resolution."""
    width, height = map(round, wanted_size(request, base.default_resolution))
    return _passes(request, base, few_steps) * width * height / base.default_resolution**2


def _passes(request: Request, base: Base, few_steps: FewStepLora | None) -> int:
    steps, guidance = _steps_and_guidance(request, base, few_steps)
    return request.num_outputs * steps * (2 if guidance > 1 else 1)


def check_work(request: Request, base: Base, few_steps: FewStepLora | None = None) -> None:
    """Raises ValueError for a request that takes too much compute for a server."""
    cost = work(request, base, few_steps)
    if cost > MOST_PASSES:
        width, height = map(round, wanted_size(request, base.default_resolution))
        steps, guidance = _steps_and_guidance(request, base, few_steps)
        passes = _passes(request, base, few_steps)
        raise ValueError(
            f"{request.num_outputs} images of {width}x{height} in {steps} steps"
            f"{' with guidance, which doubles them,' if guidance > 1 else ''} are too much for one "
            f"request: {passes:,} steps; the limit of {base.name} at this size is "
            f"{int(MOST_PASSES * passes / cost):,}; lower num_outputs, num_inference_steps or the "
            "size"
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request with every value set, for one base."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seeds: tuple[int, ...]  # one per image
    go_fast: bool = False
    prompt_strength: float | None = None  # None: without an image
    masked: bool = False  # only a part of the image is generated
    shift: float | None = None  # of `Family.sigmas`; None: the model's own schedule

    @property
    def first_step(self) -> int:
        """The first step to run with an input image.

        As in diffusers' image-to-image pipelines: of N steps, N * strength run, rounded up.
        """
        if self.prompt_strength is None:
            return 0
        return int(self.steps - self.steps * self.prompt_strength)


def resolve(
    request: Request, base: Base, multiple: int, few_steps: FewStepLora | None = None
) -> ResolvedRequest:
    """Fills in defaults; sizes are rounded to `multiple` pixels.

    Defaults of steps, guidance and schedule are those of a known few-step LoRA, else the base's.
    Raises ValueError for an image that is too large for the base.
    """
    check_size(request, base)
    width, height = wanted_size(request, base.default_resolution)
    rounded = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
    if request.width is not None and (request.width, request.height) != tuple(rounded):
        log.warning(
            "%dx%d is rounded to %dx%d: sides must be multiples of %d for %s",
            *(request.width, request.height, *rounded, multiple, base.name),
        )
    steps, guidance = _steps_and_guidance(request, base, few_steps)
    shift = few_steps.shift if few_steps and request.shift is None else request.shift or None
    _warn_of_settings(base, few_steps, steps, guidance, shift, rounded)
    if request.negative_prompt and guidance <= 1:
        log.warning("negative_prompt has no effect: guidance_scale is %g, which is off", guidance)
    if request.go_fast and guidance <= 1:
        log.warning("go_fast has no effect: guidance is off")
    strength = request.prompt_strength
    if request.image is not None and strength is None:
        strength = DEFAULT_STRENGTH
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    if strength == 0:
        log.warning("prompt_strength is 0: the input image is returned unchanged")
    return ResolvedRequest(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=rounded[0],
        height=rounded[1],
        steps=steps,
        guidance_scale=guidance,
        seeds=tuple(seed + number for number in range(request.num_outputs)),
        go_fast=request.go_fast and guidance > 1,
        prompt_strength=strength,
        masked=request.mask is not None,
        shift=shift,
    )


def _steps_and_guidance(
    request: Request, base: Base, few_steps: FewStepLora | None
) -> tuple[int, float]:
    """Values of the request, else of the few-step LoRA, else of the base."""
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
    """Logs settings of a few-step LoRA, and values that are allowed but unsuitable."""
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
            "guidance_scale %g: %s is distilled to run without guidance; its defaults are "
            "guidance_scale %g and %d steps. Guidance takes twice the time and oversaturates the "
            "image",
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
    scheduled = few_steps is None and shift is None and len(base.sample_sigmas)
    if scheduled and steps != scheduled:
        log.warning(
            "num_inference_steps %d: %s has a fixed schedule of %d steps, which is interpolated",
            *(steps, base.name, scheduled),
        )
    pixels, usual = size[0] * size[1], base.default_resolution**2
    if not usual / 4 <= pixels <= max(usual * 9 / 4, base.recommended_up_to**2):
        log.warning(
            "%dx%d is far from the %dx%d pixels that %s is made for; expect repeated or missing "
            "parts",
            *(*size, base.default_resolution, base.default_resolution, base.name),
        )


def _schedule(shift: float | None) -> str:
    return "the model's own schedule" if shift is None else f"shift {shift:g}"


def wanted_size(request: Request, resolution: int) -> tuple[float, float]:
    """Width and height before rounding; `resolution` is the base's default."""
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
