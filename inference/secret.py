"""Secrets from Cog or from Python."""

from typing import Protocol

from inference.input_fields import check_length
from inference.inputs import SECRET_LENGTH


class HoldsSecret(Protocol):
    """Cog's `Secret` and pydantic's, which are never logged."""

    def get_secret_value(self) -> str: ...


GivenSecret = str | HoldsSecret | None  # older Cog runtimes pass a string


def revealed(secret: GivenSecret) -> str | None:
    """The stripped text of a secret; None if it is empty."""
    text = secret if isinstance(secret, str) or secret is None else secret.get_secret_value()
    return text.strip() or None if text else None


def hub_token(secret: GivenSecret) -> str | None:
    """The text of `hf_api_token`. Raises ValueError for what cannot be a token."""
    token = revealed(secret)
    check_length("hf_api_token", token or "", SECRET_LENGTH)
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("hf_api_token contains characters that no token has; copy it again")
    return token
