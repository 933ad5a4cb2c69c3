"""LoRAs that make a base model generate in a few steps, and how their makers generate with them.

Guidance 1 is off. `shift` is the static shift of the sigma schedule, without a terminal shift (see
`Family.sigmas`); None is the base's own schedule.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FewStepLora:
    """A known few-step LoRA and the settings that it needs."""

    name: str
    family: str
    steps: int
    guidance_scale: float
    shift: float | None


@dataclass(frozen=True)
class _Row:
    name: str
    family: str
    pattern: re.Pattern[str]  # of a file's or title's name in lower case, words joined by hyphens
    steps: int  # where the name does not say
    shift: float | None
    guidance_scale: float = 1.0


# Qwen-Image-Lightning and -2512-Lightning: the scheduler of lightx2v/Qwen-Image-Lightning's card,
# base_shift = max_shift = ln 3 and shift_terminal None (also diffusers PR #12119).
# Turbo-LoRA: Wuli-art/Qwen-Image-2512-Turbo-LoRA, whose ComfyUI workflow has shift 3 and cfg 1.
# Z-Image-Fun: alibaba-pai/Z-Image-Fun-Lora-Distill, made for Z-Image's own schedule with cfg 1.
_TABLE = (
    _Row(
        "Qwen-Image-Lightning",
        "qwen_image",
        re.compile(
            r"^(?!.*qwen-image-2-1)"  # another model, with other sigmas
            r".*(?:qwen-image(?:-edit)?(?:-\d{4})?-lightning"
            r"|qwen.*lightning.*\d-?steps?|lightning.*qwen.*\d-?steps?|lightning.*\d-?steps?.*qwen)"
        ),
        steps=8,
        shift=3.0,
    ),
    _Row(
        "Qwen-Image-2512-Turbo-LoRA",
        "qwen_image",
        re.compile(r"qwen-image-2512-turbo"),
        steps=4,
        shift=3.0,
    ),
    _Row(
        "Z-Image-Fun-Lora-Distill",
        "z_image",
        re.compile(r"z-image-fun(?:-\w+)*-distill"),
        steps=8,
        shift=None,
    ),
)
MAX_NAME_LENGTH = 200  # characters that are looked at; names come from untrusted users
_STEPS = re.compile(r"(?<!\d)(\d{1,2})-?steps?(?![a-z])")


def find_few_step_lora(names: Iterable[str]) -> FewStepLora | None:
    """The known few-step LoRA that one of a file's names or titles belongs to, or None."""
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name[:MAX_NAME_LENGTH].lower())
        for row in _TABLE:
            if row.pattern.search(plain):
                steps = _STEPS.search(plain)
                count = int(steps[1]) if steps and int(steps[1]) else row.steps
                return FewStepLora(row.name, row.family, count, row.guidance_scale, row.shift)
    return None
