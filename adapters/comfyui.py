"""Files with which ComfyUI understands a placeholder token, and how to write it there.

ComfyUI reads the first tensor of models/embeddings/NAME.safetensors for `embedding:NAME` in a
prompt, where NAME ends at `<` or `[`; for Z-Image since January 2026, for Qwen-Image not at all
(comfy/text_encoders/z_image.py, qwen_image.py).
"""

import re
from collections.abc import Iterable, Sequence

from safetensors.torch import save

from adapters.archive_members import COMFYUI, EMBEDDING
from adapters.formats import family_of_layers
from adapters.placeholder import Placeholder

README = """\
ComfyUI
1. Copy lora/lora_weights.safetensors to models/loras, and add a node that loads the LoRA.
2. {embedding}
"""


def comfyui_files(layers: Iterable[str], placeholders: Sequence[Placeholder]) -> dict[str, bytes]:
    """The files of a weights.zip for ComfyUI, by name; none without a placeholder token.

    `layers` are those of the LoRA.
    """
    if not placeholders:
        return {}
    family = family_of_layers(layers)
    reader = None if family is None else family.lora_readers.get("comfyui")
    if reader is None or not reader.embedding:
        embedding = "ComfyUI cannot read the embedding of the token with this base model."
        return {f"{COMFYUI}/README.txt": README.format(embedding=embedding).encode()}
    files = embedding_files(placeholders)
    embedding = f"Copy {', '.join(files)} to models/embeddings.\n3. "
    embedding += "\n   ".join(how_to_write(placeholders))
    return {
        f"{COMFYUI}/README.txt": README.format(embedding=embedding).encode(),
        **{f"{COMFYUI}/{name}": data for name, data in files.items()},
    }


def embedding_files(placeholders: Sequence[Placeholder]) -> dict[str, bytes]:
    """A safetensors file for each token, by the name that ComfyUI needs."""
    names = embedding_names(each.token for each in placeholders)
    return {
        f"{names[each.token]}.safetensors": save(
            {EMBEDDING: each.vectors.detach().float().cpu().contiguous()}
        )
        for each in placeholders
    }


def how_to_write(placeholders: Sequence[Placeholder]) -> list[str]:
    """For each token, how it is written in a prompt."""
    return [
        f"For {token} write embedding:{name} with one space before it and a comma after it: "
        f'"a photo of embedding:{name}, on a beach". ComfyUI before July 2026 needs two spaces '
        "before it."
        for token, name in embedding_names(each.token for each in placeholders).items()
    ]


def embedding_names(tokens: Iterable[str]) -> dict[str, str]:
    """By token, it without brackets and other characters that end an embedding's name; unique."""
    names: dict[str, str] = {}
    for token in tokens:
        name = re.sub(r"[^A-Za-z0-9_-]", "", token) or "token"
        taken = name.lower() in map(str.lower, names.values())
        names[token] = f"{name}-{len(names) + 1}" if taken else name
    return names
