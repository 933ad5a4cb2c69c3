"""Recognizes LoRAs for few-step generation by their names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from families.registry import FAMILIES


@dataclass(frozen=True)
class FewStepLora:
    """A known few-step LoRA and the settings that it needs (`families.base.FewStepRow`)."""

    name: str
    family: str
    steps: int
    guidance_scale: float
    shift: float | None


MAX_NAME_LENGTH = 200  # characters that are searched; names are untrusted input
_STEPS = re.compile(r"(?<!\d)(\d{1,2})-?steps?(?![a-z])")


def find_few_step_lora(names: Iterable[str]) -> FewStepLora | None:
    """The known few-step LoRA that one of a file's names or titles matches, or None."""
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name[:MAX_NAME_LENGTH].lower())
        for family in FAMILIES.values():
            for row in family.few_step_loras:
                if row.pattern.search(plain):
                    steps = _STEPS.search(plain)
                    count = int(steps[1]) if steps and int(steps[1]) else row.steps
                    return FewStepLora(row.name, family.name, count, row.guidance_scale, row.shift)
    return None
