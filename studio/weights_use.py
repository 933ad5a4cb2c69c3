"""How weights are used in other programs: only what the documentation of this project says."""

import re
from typing import Any

from families.registry import UnknownBase, family_of, find_base

_DIFFUSERS = """\
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base!r}, torch_dtype=torch.bfloat16).to("cuda")
pipeline.load_lora_weights("lora_weights.safetensors")"""


def uses(row: dict[str, Any]) -> list[dict[str, str]]:
    """Short instructions for each program."""
    tokens = [re.sub(r"[^A-Za-z0-9_-]", "", each) for each in row["tokens"]]
    token = ""
    if tokens:
        token = (
            " It does not know the token: the code that adds its embedding is in the model card "
            "(docs/runs.md, Publishing)."
        )
    comfy = "Not tried with a real base model. Copy the LoRA to models/loras."
    code = "models/loras/lora_weights.safetensors"
    if tokens and not _reads_embeddings(row["base_model"]):
        comfy += " It cannot read the embedding of the token with this base model."
    elif tokens:
        comfy += (
            " Copy the token to models/embeddings, and write it in the prompt with one space "
            "before it and a comma after it."
        )
        code += "".join(f"\nmodels/embeddings/{t}.safetensors\nembedding:{t}," for t in tokens[:1])
    return [
        {
            "program": "diffusers",
            "text": "Download the LoRA; diffusers reads its layout." + token,
            "code": _DIFFUSERS.format(base=row["base_model"] or "BASE_MODEL"),
        },
        {"program": "ComfyUI", "text": comfy, "code": code},
    ]


def _reads_embeddings(base_model: str | None) -> bool:
    """Whether ComfyUI reads embeddings for a base model; true if the model is not known."""
    try:
        reader = family_of(find_base(base_model or "")).lora_readers.get("comfyui")
    except UnknownBase:
        return True
    return reader is not None and reader.embedding
