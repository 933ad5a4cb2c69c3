"""The trained weights of one request: which base they ask for and which words they bring."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adapters.archive import Archive
from adapters.containers import printable
from adapters.factors import LoraMismatch
from families.bases import Base, UnknownBase, default_base, find_base, find_base_or_folder
from families.family import Family
from families.tokens import split_words
from inference.making import LaidWeights
from inference.text_cache import digest

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Weights:
    """An archive as a request asks for it."""

    archive: Archive
    scale: float
    name: str = "weights"  # of the input that brought it, for messages

    def laid(self) -> LaidWeights:
        """What a picture's file says about them."""
        placeholder = self.archive.placeholder
        return LaidWeights(
            scale=self.scale,
            lora_sha256=self.archive.lora_sha256,
            placeholder=placeholder.token if placeholder else None,
            placeholder_sha256=digest(placeholder.vectors) if placeholder else None,
        )


def choose_base(base_model: str, weights: Sequence[Weights]) -> Base:
    """The base for a request: as asked, else what the weights were trained on, else the default.

    Raises `LoraMismatch` for weights of another family than that base.
    """
    asked = None if base_model == "auto" else find_base_or_folder(base_model)
    base = asked
    for each in weights:
        trained_on = _trained_on(each, asked)
        base = base or trained_on
        if base is None or trained_on is None:
            continue
        if trained_on.family != base.family:
            hint = "leave base_model on auto" if asked else "they belong to different models"
            raise LoraMismatch(
                f"the {each.name} were trained on {trained_on.name} and cannot be laid over "
                f"{base.name}; {hint}"
            )
    return base or default_base()


def warn_of_other_base(base: Base, weights: Sequence[Weights]) -> None:
    """Warns of weights that were trained on another base of the same family."""
    for each in weights:
        trained_on = _trained_on(each, base)
        if trained_on is not None and trained_on.name != base.name:
            log.warning(
                "%s trained on %s are used on %s: expect a weaker likeness",
                *(each.name, trained_on.name, base.name),
            )


def _trained_on(weights: Weights, asked: Base | None) -> Base | None:
    named = weights.archive.base_model
    if not named:
        return None
    try:
        return find_base(named)
    except UnknownBase as error:
        if asked is not None:
            return None
        raise UnknownBase(
            f"the {weights.name} were trained on {printable(named[:100])}, which is not a known "
            "base model; name one in base_model"
        ) from error


def vectors_of(weights: Sequence[Weights], family: Family) -> dict[str, Tensor]:
    """Embedding rows of every placeholder, by its word.

    Raises `LoraMismatch` for rows of another model, and for a word that comes twice.
    """
    vectors: dict[str, Tensor] = {}
    for each in weights:
        placeholder = each.archive.placeholder
        if placeholder is None:
            continue
        width = placeholder.vectors.shape[1]
        if width != family.text_width:
            raise LoraMismatch(
                f"the placeholder {placeholder.token} has {width} values, the text encoder of "
                f"{family.base.name} takes {family.text_width}; it was trained on another model"
            )
        if placeholder.token in vectors:
            raise LoraMismatch(
                f"the {each.name} bring the placeholder {placeholder.token} a second time; one "
                "word cannot mean two things, so train one of them with another word"
            )
        vectors[placeholder.token] = placeholder.vectors
    return vectors


def check_words(prompt: str, words: Sequence[str]) -> None:
    """Says in the log when prompt and placeholders do not go together."""
    present = split_words(prompt, words)
    for word in words:
        if word not in present:
            log.warning("the prompt does not hold %s, the word the weights were trained with", word)
    unknown = [word for word in _bracketed(prompt) if word not in words]
    if unknown:
        log.warning(
            "the prompt holds %s, which %s not trained: it is read as plain text",
            *(", ".join(unknown), "was" if len(unknown) == 1 else "were"),
        )


def _bracketed(prompt: str) -> list[str]:
    """Words that look like placeholders: `<zwx>`."""
    return [
        word
        for part in prompt.split()
        for word in [part[part.find("<") : part.find(">") + 1]]
        if len(word) > 2
    ]
