"""Other programs that read LoRAs: a table, one row per program.

What each reads of a base model is in its family's file (`Family.lora_readers`). Sources: the
programs' own key logic, read or run in 2025 and 2026 (versions in docs/adapters.md). No row is
about image quality.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from families.base import DIFFUSION_MODEL, LORA_STYLES, TRANSFORMER, LoraReader

# DoRA by the tensor with its norms: `dora_scale` as LyCORIS writes it, or PEFT's name.
DORA, PEFT_DORA = "DoRA", "DoRA (lora_magnitude_vector)"


@dataclass(frozen=True)
class Program:
    """What a program reads of any base model."""

    title: str
    # Styles with A and B in which it multiplies by `.alpha` tensors; it ignores them in others.
    alpha_tensors: Collection[str] = ()
    alpha_header: bool = False  # reads alpha from the header's lora_adapter_metadata
    forms: Collection[str] = ()  # other kinds than plain LoRA that it reads


PROGRAMS: dict[str, Program] = {
    "diffusers": Program(
        "diffusers", alpha_tensors=(DIFFUSION_MODEL,), alpha_header=True, forms=(PEFT_DORA,)
    ),
    "comfyui": Program(
        "ComfyUI",
        alpha_tensors=(TRANSFORMER, DIFFUSION_MODEL),
        forms=("LoKr", "LoHa", DORA, "a whole change"),
    ),
    "ai-toolkit": Program("ai-toolkit", forms=("LoKr",)),
    "musubi": Program("musubi-tuner"),
    "kohya": Program("kohya's layout"),
    "onetrainer": Program("OneTrainer", alpha_tensors=LORA_STYLES),
    "diffsynth": Program("DiffSynth-Studio"),
    "sglang": Program("SGLang", alpha_header=True),
    "mflux": Program("mflux", alpha_header=True),
    "invokeai": Program("InvokeAI"),
}


class Found(NamedTuple):
    """How a file is written."""

    style: str | None  # None: a style outside of the table
    kinds: frozenset[str]  # other kinds than plain LoRA
    alpha_tensors: bool  # `.alpha` other than the rank
    alpha_header: bool  # the same in the header


def verdict(program: Program, reader: LoraReader | None, found: Found) -> str:
    """Whether a program reads a file: "yes", or "no" or "wrong strength" with the reason."""
    if reader is None:
        return "not known for this base model"
    strange = sorted(found.kinds - set(program.forms))
    if strange:
        return f"not known: it has {' and '.join(strange)}"
    if found.style is None:
        return "not known: its names are of another layout"
    if found.style not in reader.reads:
        return f"no: it does not read {found.style} for this base"
    if found.style in (TRANSFORMER, DIFFUSION_MODEL):
        if found.alpha_tensors and found.style not in program.alpha_tensors:
            return "wrong strength: it ignores .alpha beside lora_A"
        if found.alpha_header and not program.alpha_header:
            return "wrong strength: it ignores alpha in the header"
    return "yes"
