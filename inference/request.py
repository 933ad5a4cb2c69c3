"""Generation requests: as given by the user, and resolved for one base model."""

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image
from pydantic import InstanceOf, model_validator

from families.base import Base
from families.few_steps import FewStepLora
from families.registry import editing
from inference.inputs import WITH_TOKEN, ApplyLora, GenerationInputs, SharedInputs

log = logging.getLogger(__name__)

REFERENCES = "reference_images"  # the input's name
BLACK_MASK = "mask is black everywhere, so nothing would be generated; paint that part white"
LONGEST = 3.0  # most extreme aspect ratio that is taken from an input image
MOST_STRETCHED = 16  # and of a reference image
DEFAULT_STRENGTH = 0.8
# Most compute of one request to a server, in transformer passes of one image of the base's default
# resolution. 8 images of 50 guided steps are 800: 2 minutes of Qwen-Image on an H100.
MOST_PASSES = 2_000


class Request(SharedInputs):
    """What to generate. None: the base model's default."""

    apply_lora: ApplyLora = WITH_TOKEN
    image: InstanceOf[Image.Image] | None = None  # to start from
    reference_images: Sequence[InstanceOf[Image.Image]] = ()  # of an editing model
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
        cls, inputs: GenerationInputs, read: Callable[[str, Path | str], Image.Image]
    ) -> "Request":
        """The request of these inputs. `read` reads an image, by its input's name and source."""
        shared = {name: getattr(inputs, name) for name in SharedInputs.model_fields}
        images: dict[str, Any] = {
            name: read(name, source)
            for name in ("image", "mask")
            if (source := getattr(inputs, name))
        }
        references = tuple(read(REFERENCES, each) for each in inputs.reference_images)
        return cls(**shared, apply_lora=inputs.apply_lora, reference_images=references, **images)


def check_images(request: Request, base: Base) -> None:
    """Raises ValueError for an image that is too large for the base, and for reference images
    that it does not take."""
    check_references(len(request.reference_images), base)
    check_size(request, base)
    for number, each in enumerate(request.reference_images, start=1):
        if max(each.size) > MOST_STRETCHED * min(each.size):
            raise ValueError(
                f"reference image {number} is {each.width}x{each.height}; crop it, so that its "
                f"longer side is at most {MOST_STRETCHED} times the shorter one"
            )


def check_references(count: int, base: Base) -> None:
    """Raises ValueError for a number of reference images that the base does not take."""
    if count and not base.most_references:
        raise ValueError(
            f"{base.name} takes no reference_images; set base_model to an editing model: "
            f"{', '.join(editing())}"
        )
    if base.needs_references and not count:
        raise ValueError(
            f"{base.name} edits images: give 1 to {base.most_references} in reference_images"
        )
    if count > base.most_references:
        raise ValueError(
            f"{count} reference_images; {base.name} takes at most {base.most_references}"
        )


def check_size(request: Request, base: Base) -> None:
    """Raises ValueError for an image that is too large for the base."""
    width, height = map(round, wanted_size(request, base))
    most = base.largest_resolution
    if width * height > most**2:
        raise ValueError(
            f"{width}x{height} is too large for {base.name}: at most {most}x{most}, or as many "
            f"pixels ({most**2:,}) at another aspect ratio"
        )


def work(request: Request, base: Base, few_steps: FewStepLora | None = None) -> float:
    """Compute of a request, in passes of an image of the base's default resolution.

    The tokens of reference images count as those of the image: in the linear layers, and again
    for each other one in the attention.
    """
    width, height = map(round, wanted_size(request, base))
    pixels = width * height + len(request.reference_images) * base.reference_resolution**2
    images = pixels / base.default_resolution**2
    attention = base.attention_share * max(0.0, images - 1)
    return _passes(request, base, few_steps) * images * (1 + attention)


def _passes(request: Request, base: Base, few_steps: FewStepLora | None) -> int:
    steps, guidance = _steps_and_guidance(request, base, few_steps)
    return request.num_outputs * steps * (2 if guidance > 1 else 1)


def check_work(request: Request, base: Base, few_steps: FewStepLora | None = None) -> None:
    """Raises ValueError for a request that takes too much compute for a server."""
    cost = work(request, base, few_steps)
    if cost > MOST_PASSES:
        width, height = map(round, wanted_size(request, base))
        steps, guidance = _steps_and_guidance(request, base, few_steps)
        passes = _passes(request, base, few_steps)
        count = len(request.reference_images)
        beside = f" beside {count} reference images" if count else ""
        raise ValueError(
            f"{request.num_outputs} images of {width}x{height} in {steps} steps"
            f"{' with guidance, which doubles them,' if guidance > 1 else ''}{beside} are too much "
            f"for one request: {passes:,} steps; the limit of {base.name} at this size is "
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
    references: int = 0  # number of reference images
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
    width, height = wanted_size(request, base)
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
        references=len(request.reference_images),
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


def wanted_size(request: Request, base: Base) -> tuple[float, float]:
    """Width and height before rounding."""
    if request.width is not None and request.height is not None:
        return request.width, request.height
    if request.aspect_ratio is not None:
        across, down = map(int, request.aspect_ratio.split(":"))
        ratio = across / down
    elif request.image is not None or request.reference_images:
        image = request.image or request.reference_images[-1]  # the last, as in the pipeline
        ratio = image.width / image.height
        ratio = min(max(ratio, 1 / LONGEST), LONGEST)
    else:
        ratio = 1.0
    edge = base.reference_resolution if request.reference_images else base.default_resolution
    return edge * ratio**0.5, edge * (1 / ratio) ** 0.5
