"""The weights of one request: their base model and their placeholder tokens."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from adapters.archive import Archive
from adapters.baked import why_not_again
from adapters.files.containers import printable
from adapters.formats import LoraMismatch
from adapters.trained_model import is_trained_model, read_trained_model
from families.base import Base
from families.family import Family
from families.few_steps import FewStepLora, find_few_step_lora
from families.registry import (
    UnknownBase,
    default_base,
    find_base,
    find_base_or_folder,
    with_transformer,
)
from families.tokens import split_words
from inference.image_metadata import RequestedWeights
from inference.inputs import ALWAYS
from inference.prompts import check_syntax
from inference.text_cache import digest

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Weights:
    """An archive with its scale in a request."""

    archive: Archive
    scale: float
    name: str = "weights"  # for messages
    wanted: bool = True  # False: the prompt contains none of the tokens (`apply_lora`)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The placeholder tokens of the archive."""
        return self.archive.tokens

    @property
    def applied_scale(self) -> float:
        """The scale to merge with; 0 if they are not applied."""
        return self.scale if self.wanted else 0.0

    def described(self) -> RequestedWeights:
        """Their entry in an image's metadata."""
        hashes = {token: digest(vectors) for token, vectors in self.archive.vectors.items()}
        token = next(iter(hashes), None)
        return RequestedWeights(
            applied=self.applied_scale != 0,
            scale=self.scale,
            lora_sha256=self.archive.lora_sha256,
            placeholder=token,
            placeholder_sha256=hashes.pop(token) if token else None,
            other_placeholders=hashes,
        )


def select(weights: Sequence[Weights], texts: Iterable[str], apply_lora: str) -> list[Weights]:
    """The weights with `wanted` by the rule of `apply_lora`; logs those without their token.

    `texts` are those that are encoded: the prompt and, with guidance, the negative prompt. Any one
    of an archive's tokens is enough. LoRAs without a token and few-step LoRAs are always wanted.
    """
    tokens = [token for each in weights for token in each.tokens]
    present = {part for text in texts for part in split_words(text, tokens)}
    selected = []
    for each in weights:
        missing = bool(each.tokens) and not present.intersection(each.tokens)
        if each.archive.model and each.scale != 1:
            log.warning("the %s are a whole model, so their scale has no effect", each.name)
        always = find_few_step_lora(each.archive.names) or each.archive.model  # part of the base
        wanted = apply_lora == ALWAYS or bool(always) or not missing
        if missing and each.scale != 0:
            named = " or ".join(each.tokens)
            if wanted:
                log.warning(
                    "the prompt does not contain %s, the token that the %s were trained with",
                    *(named, each.name),
                )
            else:
                log.warning(
                    "the %s are not applied, since the prompt does not contain their token %s; "
                    "add it to the prompt, or set apply_lora to always",
                    *(each.name, named),
                )
        selected.append(replace(each, wanted=wanted))
    return selected


def few_step_lora(weights: Sequence[Weights], base: Base) -> FewStepLora | None:
    """The known few-step LoRA for this base in the weights, or None."""
    found = []
    for each in weights:
        lora = find_few_step_lora(each.archive.names) if each.scale > 0 else None
        if lora is not None and lora.family == base.family and not base.distilled:
            found.append(lora)
    if len(found) > 1 and found[0] != found[1]:
        log.warning(
            "two few-step LoRAs (%s, %s): the settings of the first are used",
            *(found[0].name, found[1].name),
        )
    return found[0] if found else None


def warn_of_no_effect(weights: Weights, total: int, zero: list[str], lost: list[str]) -> None:
    """Warns of a LoRA if most of its layers are zero or lost in rounding."""
    if len(zero) == total:
        log.warning(
            "the %s: all %d layers are zero (a factor of each is zero), so the LoRA has no effect; "
            "its training failed, or it was never trained",
            *(weights.name, total),
        )
    elif len(zero) * 2 >= total:
        log.warning(
            "the %s: %d of %d layers have no effect (a factor of each is zero)",
            *(weights.name, len(zero), total),
        )
    elif zero:
        log.info("the %s: %d of %d layers are zero", weights.name, len(zero), total)
    if lost:
        log.warning(
            "the %s: in %d of %d layers the change at scale %g is lost in the rounding of the base "
            "model's dtype; raise lora_scale, or train for longer",
            *(weights.name, len(lost), total, weights.scale),
        )


def warn_of_untrained_placeholder(weights: Weights) -> None:
    """Warns of placeholder tokens whose embedding was not trained."""
    meta = weights.archive.meta
    for each in weights.archive.placeholders:
        facts = meta.get("zero_prior")
        if isinstance(several := meta.get("zero_priors"), dict):
            facts = several.get(each.token)
        facts = facts if isinstance(facts, dict) else {}
        norm, start = each.norm(), facts.get("norm_start")
        as_at_start = isinstance(start, int | float) and math.isclose(norm, start, rel_tol=1e-6)
        if norm == 0 or as_at_start or facts.get("steps_with_placeholder") == 0:
            log.warning(
                "the %s: the embedding of %s was not trained (norm %.3g), so the token has no "
                "effect in a prompt; train again with captions that contain it",
                *(weights.name, each.token, norm),
            )


def choose_base(
    base_model: str, weights: Sequence[Weights], default: Callable[[], Base] = default_base
) -> Base:
    """The base for a request: `base_model`, else the weights' base, else the default.

    With weights of a full training, their transformer replaces that base's. Raises `LoraMismatch`
    for weights of another family than that base, and for two transformers.
    """
    asked = None if base_model == "auto" else find_base_or_folder(base_model)
    base = asked
    for each in weights:
        trained_on = _trained_on(each, asked)
        base = base or trained_on
        if base is None or trained_on is None:
            continue
        if trained_on.family != base.family:
            hint = "set base_model to auto" if asked else "they belong to different models"
            raise LoraMismatch(
                f"the {each.name} were trained on {trained_on.name} and cannot be applied to "
                f"{base.name}; {hint}"
            )
        if each.archive.model and trained_on.name not in (base.name, base.hub_id):
            own = base.completed_by is not None and base.folder == each.archive.model.absolute()
            if not own:
                raise LoraMismatch(
                    f"the {each.name} are the whole transformer of {trained_on.name}, and cannot "
                    f"replace that of {base.name}; set base_model to auto"
                )
    base = base or default()
    models = [each.archive.model for each in weights if each.archive.model is not None]
    models += [base.folder] if base.folder is not None and is_trained_model(base.folder) else []
    if len(different := {each.absolute() for each in models}) > 1:
        raise LoraMismatch(
            f"{' and '.join(sorted(map(str, different)))} are whole models: use one of them"
        )
    if not models or models[0].absolute() == base.folder:
        return base
    return with_transformer(base, models[0])


def with_own_tokens(weights: Sequence[Weights], base: Base) -> list[Weights]:
    """The weights, and the tokens of a base model that is a whole trained or baked one.

    Raises `LoraMismatch` for a LoRA that is baked into the base model.
    """
    for each in weights:
        if each.archive.model is not None:  # the base model's own
            continue
        if reason := why_not_again(each.archive, each.name, each.scale, base):
            raise LoraMismatch(reason)
    if base.folder is None or not is_trained_model(base.folder):
        return [*weights]
    if any(each.archive.model is not None for each in weights):
        return [*weights]
    return [Weights(read_trained_model(base.folder), 1.0, "base model"), *weights]


def warn_of_other_base(base: Base, weights: Sequence[Weights]) -> None:
    """Warns of weights that were trained on another base of the same family, and of a scale for a
    whole model, which has none.

    Not if LoRAs for this base are trained on that one (`Base.train_on`).
    """
    usual = {base.name, base.train_on.name if base.train_on else base.name}
    for each in weights:
        if each.archive.model is not None and each.scale != 1:
            log.warning(
                "the scale %g has no effect: the %s are a whole model, not a LoRA",
                *(each.scale, each.name),
            )
        trained_on = None if each.archive.model else _trained_on(each, base)
        # At scale 0 they supply the token only, as to a single file with the LoRA baked in.
        if each.scale != 0 and trained_on is not None and trained_on.name not in usual:
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
    """Embedding vectors of all placeholder tokens.

    Raises `LoraMismatch` for vectors of another model, and for a token that occurs twice.
    """
    vectors: dict[str, Tensor] = {}
    for each in weights:
        for token, rows in each.archive.vectors.items():
            if rows.shape[1] != family.text_width:
                raise LoraMismatch(
                    f"the placeholder {token} has {rows.shape[1]} values, but the text encoder of "
                    f"{family.base.name} has {family.text_width}; it was trained on another model"
                )
            if token in vectors:
                raise LoraMismatch(
                    f"the {each.name} have the same placeholder {token} as the first; "
                    "train one of them with another token"
                )
            vectors[token] = rows
    return vectors


def check_tokens(prompt: str, tokens: Sequence[str]) -> None:
    """Warns of unknown tokens in a prompt, and of unsupported syntax."""
    check_syntax("prompt", prompt)
    unknown = [word for word in _bracketed(prompt) if word not in tokens and ":" not in word]
    if unknown:
        log.warning(
            "the prompt contains %s, which %s not trained: it is read as plain text",
            *(", ".join(unknown), "was" if len(unknown) == 1 else "were"),
        )


def _bracketed(prompt: str) -> list[str]:
    """Words that look like placeholder tokens: `<zwx>`."""
    return [
        word
        for part in prompt.split()
        for word in [part[part.find("<") : part.find(">") + 1]]
        if len(word) > 2
    ]
