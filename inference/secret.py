"""Secrets from Cog or from Python."""

from typing import Protocol


class HoldsSecret(Protocol):
    """Cog's `Secret` and pydantic's, which are never logged."""

    def get_secret_value(self) -> str: ...


GivenSecret = str | HoldsSecret | None  # older Cog runtimes pass a string


def revealed(secret: GivenSecret) -> str | None:
    """The stripped text of a secret; None if it is empty."""
    text = secret if isinstance(secret, str) or secret is None else secret.get_secret_value()
    return text.strip() or None if text else None
