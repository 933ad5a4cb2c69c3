"""Checks placeholder tokens. Does not import PyTorch."""

import logging
from collections.abc import Sequence
from itertools import combinations

from families.tokens import PromptTokenizer

log = logging.getLogger(__name__)

MAX_LENGTH = 64  # characters
MAX_TOKENS = 8  # of one LoRA; each takes a share of its capacity and of the steps


class PlaceholderError(ValueError):
    """An invalid placeholder token."""


def check_token(token: str, prompts: PromptTokenizer | None = None) -> None:
    """Raises `PlaceholderError` for an invalid placeholder token.

    Without `prompts` only its characters are checked, which needs no tokenizer. A token without
    angle brackets is allowed, with a warning in the log.
    """
    if not token:
        raise PlaceholderError("placeholder_token is empty; set it to a token such as <zwx>")
    if any(character.isspace() for character in token):
        raise PlaceholderError(
            f"placeholder_token {token!r} contains white space; use one word such as <zwx>"
        )
    if not token.isprintable():
        raise PlaceholderError(
            f"placeholder_token {token!r} contains unprintable characters; use one such as <zwx>"
        )
    if len(token) > MAX_LENGTH:
        raise PlaceholderError(
            f"placeholder_token has {len(token)} characters; {MAX_LENGTH} is the limit"
        )
    if token == "TOK":
        raise PlaceholderError(
            "placeholder_token TOK is reserved: in captions it is replaced by the placeholder "
            "token; use one such as <zwx>"
        )
    if token == "__metadata__":  # reserved in safetensors files
        raise PlaceholderError("placeholder_token __metadata__ is reserved; choose another token")
    if prompts is not None:
        _check_against(token, prompts)
        if not (token.startswith("<") and token.endswith(">")):
            log.warning(
                "placeholder_token %r has no angle brackets: in prompts it must be a separate "
                "word; <%s> is safer",
                token,
                token,
            )


def check_distinct(tokens: Sequence[str]) -> None:
    """Raises `PlaceholderError` for tokens that one LoRA cannot have together.

    Their case is ignored: names that differ in nothing else are mixed up in prompts.
    """
    if len(tokens) > MAX_TOKENS:
        raise PlaceholderError(
            f"there are {len(tokens)} placeholder tokens; at most {MAX_TOKENS} can share a LoRA"
        )
    for one, other in combinations(tokens, 2):
        if one.casefold() == other.casefold():
            raise PlaceholderError(
                f"two subjects have the placeholder token {one!r}; give each its own"
            )
        short, long = sorted((one, other), key=len)
        if short.casefold() in long.casefold():
            raise PlaceholderError(
                f"placeholder token {short!r} is part of {long!r}; choose another token"
            )


def _check_against(token: str, prompts: PromptTokenizer) -> None:
    tokenizer = prompts.tokenizer
    for special in tokenizer.get_added_vocab():
        if token in special or special in token:
            raise PlaceholderError(
                f"placeholder_token {token!r} collides with the model's token {special!r}; "
                "choose another token"
            )
    if token in prompts.template:
        raise PlaceholderError(
            f"placeholder_token {token!r} is part of the template around every prompt; "
            "choose another token"
        )
    # Many known words are single tokens only with a space before them.
    spellings = (token, f" {token}")
    if any(len(tokenizer(each, add_special_tokens=False)["input_ids"]) == 1 for each in spellings):
        raise PlaceholderError(
            f"placeholder_token {token!r} is a token that the tokenizer already knows; "
            "it has a meaning; choose a new one such as <zwx>"
        )
