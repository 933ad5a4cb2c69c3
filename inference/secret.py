"""The text of a secret, as Cog or a Python caller gives it."""

from typing import Protocol


class HoldsSecret(Protocol):
    """Cog's `Secret` and pydantic's, which no log shows."""

    def get_secret_value(self) -> str: ...


GivenSecret = str | HoldsSecret | None  # older Cog runtimes give the text


def revealed(secret: GivenSecret) -> str | None:
    """The text without white space around it; None for nothing."""
    text = secret if isinstance(secret, str) or secret is None else secret.get_secret_value()
    return text.strip() or None if text else None
