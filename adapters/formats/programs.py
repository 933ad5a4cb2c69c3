"""What other programs read and write: a table, one row per program.

Sources: the programs' own key logic, read or run in 2025 and 2026 (versions in docs/adapters.md).
Only plain LoRAs are covered; no row is about image quality.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

Z_IMAGE, QWEN_IMAGE = "z_image", "qwen_image"  # `Family.name`

# Ways to name the tensors of a plain LoRA.
TRANSFORMER = "transformer.…lora_A"
DIFFUSION_MODEL = "diffusion_model.…lora_A"
BARE = "…lora_down without a prefix"
KOHYA = "lora_unet_…lora_down"
STYLES = (TRANSFORMER, DIFFUSION_MODEL, BARE, KOHYA)


@dataclass(frozen=True)
class Program:
    """One program, by what it reads for each family, and what `convert` writes for it."""

    title: str
    reads: Mapping[str, Collection[str]]  # family -> styles that it reads completely
    writes: Mapping[str, str]  # family -> the style that `convert` chooses
    # Styles of A/B in which it multiplies by `.alpha` tensors; it ignores them in others.
    alpha_tensors: Collection[str] = ()
    alpha_header: bool = False  # reads alpha from the header's lora_adapter_metadata
    forms: Collection[str] = ()  # other kinds than plain LoRA that it reads
    embedding: Collection[str] = ()  # families for which it reads a token's embedding file
    notes: Mapping[str, str] = field(default_factory=dict)  # by family


_ALL_FORMS = frozenset(("LoKr", "LoHa", "DoRA", "a whole change"))
_BOTH = {Z_IMAGE: DIFFUSION_MODEL, QWEN_IMAGE: DIFFUSION_MODEL}
_DIFFUSERS = {Z_IMAGE: TRANSFORMER, QWEN_IMAGE: TRANSFORMER}
_KOHYA = {Z_IMAGE: KOHYA, QWEN_IMAGE: KOHYA}

PROGRAMS: dict[str, Program] = {
    "diffusers": Program(
        "diffusers",
        reads={Z_IMAGE: STYLES, QWEN_IMAGE: STYLES},
        writes=_DIFFUSERS,
        alpha_tensors=(DIFFUSION_MODEL,),
        alpha_header=True,
    ),
    "comfyui": Program(
        "ComfyUI",
        # `transformer.` for Z-Image since pull request 11135 (December 2025).
        reads={Z_IMAGE: (TRANSFORMER, DIFFUSION_MODEL, BARE), QWEN_IMAGE: STYLES},
        writes=_BOTH,
        alpha_tensors=(TRANSFORMER, DIFFUSION_MODEL),
        forms=_ALL_FORMS,
        embedding=(Z_IMAGE,),
        notes={QWEN_IMAGE: "ComfyUI reads no embedding files for Qwen-Image"},
    ),
    "ai-toolkit": Program(
        "ai-toolkit",
        reads=dict.fromkeys((Z_IMAGE, QWEN_IMAGE), (TRANSFORMER, DIFFUSION_MODEL)),
        writes=_BOTH,
        forms=("LoKr",),
    ),
    "musubi": Program(
        "musubi-tuner",
        reads=dict.fromkeys((Z_IMAGE, QWEN_IMAGE), (KOHYA,)),
        writes=_KOHYA,
    ),
    "kohya": Program(
        "kohya's layout",
        reads=dict.fromkeys((Z_IMAGE, QWEN_IMAGE), (KOHYA,)),
        writes=_KOHYA,
        notes={Z_IMAGE: "ComfyUI does not know these names for Z-Image"},
    ),
    "onetrainer": Program(
        "OneTrainer",
        reads={Z_IMAGE: STYLES, QWEN_IMAGE: STYLES},
        writes=_DIFFUSERS,
        notes=dict.fromkeys((Z_IMAGE, QWEN_IMAGE), "the rank in its settings must be the file's"),
    ),
    "diffsynth": Program(
        "DiffSynth-Studio",
        reads=dict.fromkeys((Z_IMAGE, QWEN_IMAGE), (DIFFUSION_MODEL, BARE)),
        writes=_BOTH,
    ),
    "sglang": Program(
        "SGLang",
        reads=dict.fromkeys((Z_IMAGE, QWEN_IMAGE), (DIFFUSION_MODEL, BARE)),
        writes=_BOTH,
        alpha_header=True,
    ),
    "mflux": Program(
        "mflux",
        reads={
            Z_IMAGE: (TRANSFORMER, DIFFUSION_MODEL, BARE),
            QWEN_IMAGE: (DIFFUSION_MODEL, BARE),
        },
        writes=_BOTH,
        alpha_header=True,
        notes={QWEN_IMAGE: "layers outside of the blocks and modulations are not read"},
    ),
    "invokeai": Program(
        "InvokeAI",
        reads={
            Z_IMAGE: (TRANSFORMER, DIFFUSION_MODEL),
            QWEN_IMAGE: (TRANSFORMER, BARE, KOHYA),
        },
        writes=_DIFFUSERS,
    ),
}


class Found(NamedTuple):
    """How a file is written."""

    style: str | None  # None: a style outside of the table
    kinds: frozenset[str]  # other kinds than plain LoRA
    alpha_tensors: bool  # `.alpha` other than the rank
    alpha_header: bool  # the same in the header


def verdict(program: Program, family: str, found: Found) -> str:
    """Whether a program reads a file: "yes", or "no" or "wrong strength" with the reason."""
    strange = sorted(found.kinds - set(program.forms))
    if strange:
        return f"not known: it has {' and '.join(strange)}"
    if found.style is None:
        return "not known: its names are of another layout"
    if found.style not in program.reads[family]:
        return f"no: it does not read {found.style} for this base"
    if found.style in (TRANSFORMER, DIFFUSION_MODEL):
        if found.alpha_tensors and found.style not in program.alpha_tensors:
            return "wrong strength: it ignores .alpha beside lora_A"
        if found.alpha_header and not program.alpha_header:
            return "wrong strength: it ignores alpha in the header"
    return "yes"
