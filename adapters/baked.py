"""The record of the LoRAs that were baked into the weights of a base model.

It is in the header of each safetensors file, as `zeroprior.baked`: a list in JSON. So a single file
has it too, and it stays when files are moved or renamed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from adapters.files.containers import printable
from families.base import Base
from families.registry import tokens_of_full_training
from families.repository import transformer_source

if TYPE_CHECKING:
    from adapters.archive import Archive

_KEY = "zeroprior.baked"


@dataclass(frozen=True)
class BakedLora:
    """One LoRA in the weights."""

    name: str  # of its file
    sha256: str | None  # `Archive.lora_sha256`
    tokens: tuple[str, ...]
    scale: float

    def is_like(self, archive: "Archive") -> bool:
        """Whether an archive has the same LoRA, or one for the same token."""
        same = archive.lora_sha256 is not None and archive.lora_sha256 == self.sha256
        return same or not set(self.tokens).isdisjoint(archive.tokens)


def baked_loras(base: Base) -> tuple[BakedLora, ...]:
    """The LoRAs in the weights of a base model's folder. A published base has none.

    Files without a readable record have none either: that they are damaged is said when they are
    loaded.
    """
    if base.folder is None:
        return ()
    from adapters.files.tensor_file import TensorFile  # imports PyTorch

    try:
        source = transformer_source(base)
        file = source if source.is_file() else min(source.glob("*.safetensors"))
        with file.open("rb") as opened:
            tensors = TensorFile(opened, file.stat().st_size, most_float32_bytes=inf)
        return tuple(map(_read, json.loads(tensors.metadata.get(_KEY, "[]"))))
    except (RuntimeError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return ()


def own_tokens(base: Base) -> set[str]:
    """The tokens that a base model's folder was trained for, or that a LoRA in it was."""
    return {*tokens_of_full_training(base), *(t for each in baked_loras(base) for t in each.tokens)}


def header_of_baked(loras: Sequence[BakedLora]) -> dict[str, str]:
    """The record, for the header of a safetensors file."""
    return {_KEY: json.dumps([asdict(each) for each in loras])}


def why_not_again(archive: "Archive", name: str, scale: float, base: Base) -> str:
    """Why a LoRA cannot be applied to a base model that has it already; empty if it can.

    At scale 0 it may supply its token to a base model that has only the LoRA. `name` is a plural.
    """
    with_token = not set(archive.tokens).isdisjoint(tokens_of_full_training(base))
    found = next((each for each in baked_loras(base) if each.is_like(archive)), None)
    if found is None or (scale == 0 and not with_token):
        return ""
    tokens = "".join(f", token {printable(each)}" for each in found.tokens)
    hint = ""
    if archive.tokens and not with_token:
        hint = ", or with their scale at 0, for the token only"
    return (
        f"{base.name} has {printable(found.name)} baked in (scale {found.scale:g}{tokens}), and "
        f"the {name} are the same LoRA or have the same token; use {base.name} without them{hint}"
    )


def _read(entry: Any) -> BakedLora:
    name, sha256, tokens, scale = (entry[key] for key in ("name", "sha256", "tokens", "scale"))
    return BakedLora(str(name)[:200], str(sha256), tuple(map(str, tokens)), float(scale))
