"""Which texts can be a placeholder token. Needs no PyTorch."""

import logging

from families.tokens import PromptTokenizer

log = logging.getLogger(__name__)

MAX_LENGTH = 64  # characters


class PlaceholderError(ValueError):
    """A placeholder token that cannot be used."""


def check_token(token: str, prompts: PromptTokenizer | None = None) -> None:
    """Raises `PlaceholderError` for a token that cannot be a new word.

    Without `prompts` only its spelling is checked, which needs no model. A token without angle
    brackets is allowed, with a warning in the log.
    """
    if not token:
        raise PlaceholderError("placeholder_token is empty; give it a name such as <zwx>")
    if any(character.isspace() for character in token):
        raise PlaceholderError(
            f"placeholder_token {token!r} holds white space; use one word such as <zwx>"
        )
    if not token.isprintable():
        raise PlaceholderError(f"placeholder_token {token!r} holds characters that do not print")
    if len(token) > MAX_LENGTH:
        raise PlaceholderError(
            f"placeholder_token has {len(token)} characters; {MAX_LENGTH} is the most"
        )
    if token == "TOK":
        raise PlaceholderError("placeholder_token TOK stands for the subject in captions already")
    if token == "__metadata__":  # a safetensors file cannot hold a tensor of that name
        raise PlaceholderError("placeholder_token __metadata__ is reserved; choose another word")
    if prompts is not None:
        _check_against(token, prompts)
        if not (token.startswith("<") and token.endswith(">")):
            log.warning(
                "placeholder_token %r has no angle brackets: prompts have to write it as a word of "
                "its own; <%s> is safer",
                token,
                token,
            )


def _check_against(token: str, prompts: PromptTokenizer) -> None:
    tokenizer = prompts.tokenizer
    for special in tokenizer.get_added_vocab():
        if token in special or special in token:
            raise PlaceholderError(
                f"placeholder_token {token!r} collides with the model's token {special!r}; "
                "choose another word"
            )
    if token in prompts.template:
        raise PlaceholderError(
            f"placeholder_token {token!r} is part of the template around every prompt; "
            "choose another word"
        )
    # Words have an id of their own with a space before them, some of them only so.
    spellings = (token, f" {token}")
    if any(len(tokenizer(each, add_special_tokens=False)["input_ids"]) == 1 for each in spellings):
        raise PlaceholderError(
            f"placeholder_token {token!r} is a word the tokenizer already knows, with a meaning "
            "of its own; choose one it does not, such as <zwx>"
        )
