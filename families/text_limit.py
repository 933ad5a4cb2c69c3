"""Finds the part of a prompt or caption beyond the text encoder's limit, without the encoder."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from families.tokens import Cut

if TYPE_CHECKING:
    from torch import Tensor

    from families.family import Family


def cut(family: "Family", text: str, vectors: "Mapping[str, Tensor] | None" = None) -> Cut | None:
    """The parts of the text that are encoded and cut off; None if all of it is encoded.

    `vectors` maps each placeholder token to its embedding rows, as in `Family.encode_prompts`.
    """
    tokenized = family.tokenize(text, vectors)
    return family.prompts.cut(tokenized, family.text_limit(tokenized))
