"""Keys and tokens of a user's accounts, which no log, file, error or repr ever shows."""

from dataclasses import dataclass
from typing import Any, NoReturn

_HIDDEN = "**********"


class Secret:
    """A key that is seen only where `reveal()` is written out.

    Its text and repr are stars, and it can be neither pickled nor turned into JSON, so that no
    record of a training holds it by accident.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value.strip()  # pasted keys end with a line break, and headers then show them

    @classmethod
    def of(cls, given: Any) -> "Secret | None":
        """A secret from text, from Cog's `Secret`, or from one of ours; None for nothing."""
        if given is None or isinstance(given, Secret):
            return given
        value = given.get_secret_value() if hasattr(given, "get_secret_value") else given
        return cls(str(value)) if str(value).strip() else None

    def reveal(self) -> str:
        """The key itself, for the one call that needs it."""
        return self._value

    def hide_in(self, text: str) -> str:
        """The text with the key painted over, for messages that another library wrote."""
        return text.replace(self._value, _HIDDEN)

    def __repr__(self) -> str:
        return _HIDDEN

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a secret is not to be stored")


def hidden(text: object, *secrets: Secret | None) -> str:
    """`text` with every secret painted over."""
    shown = str(text)
    for secret in secrets:
        if secret is not None:
            shown = secret.hide_in(shown)
    return shown


@dataclass(frozen=True)
class Secrets:
    """The keys a training is given. They travel beside the settings and never among them."""

    wandb_api_key: Secret | None = None
    hf_token: Secret | None = None
