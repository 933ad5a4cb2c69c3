"""Keys and tokens of a user's accounts, redacted in logs, files, errors and reprs."""

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote, quote_plus

from inference.secret import GivenSecret, revealed

_HIDDEN = "**********"
_CUT = 8  # characters; parts of a key of this length are redacted too
_ESCAPE = re.compile("%[0-9A-F]{2}")


class Secret:
    """A key that is only accessible by `reveal()`.

    Its str and repr are stars, and it cannot be pickled or converted to JSON, so that it is not
    stored by accident.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value.strip()  # errors about headers show keys that end with a line break

    @classmethod
    def of(cls, given: "Secret | GivenSecret") -> "Secret | None":
        """A secret from text, from Cog's `Secret`, or from a `Secret`; None if it is empty."""
        if isinstance(given, Secret):
            return given
        text = revealed(given)
        return None if text is None else cls(text)

    def reveal(self) -> str:
        """The key, for the call that needs it."""
        return self._value

    def hide_in(self, text: str) -> str:
        """The text with the key redacted, for messages of other libraries.

        Also redacts the key in URLs (percent-encoded), in base64 (as in `Authorization: Basic`,
        after any user name), and parts of these of `_CUT` characters or more.
        """
        secret = bytearray(len(text))  # 1 for every character to redact
        for piece in {piece for form in self._forms() for piece in _pieces(form)}:
            start = text.find(piece)
            while start >= 0:
                secret[start : start + len(piece)] = b"\1" * len(piece)
                start = text.find(piece, start + 1)
        shown, inside = [], False
        for character, redact in zip(text, secret, strict=True):
            if not redact:
                shown.append(character)
            elif not inside:
                shown.append(_HIDDEN)
            inside = bool(redact)
        return "".join(shown)

    def _forms(self) -> set[str]:
        """The key in all encodings."""
        if not self._value:
            return set()
        raw = self._value.encode(errors="replace")
        forms = {quote(raw, safe=""), quote(raw), quote_plus(raw)}
        forms |= {_ESCAPE.sub(lambda escape: escape[0].lower(), form) for form in forms}
        for before in range(3):  # base64 depends on the number of bytes before it, modulo three
            padded = b"\0" * before + raw
            whole = base64.b64encode(padded).decode().rstrip("=")
            # Without characters at the ends that also encode other bytes.
            inner = whole[-(-before * 8 // 6) : len(padded) * 8 // 6]
            forms |= {inner, inner.translate(str.maketrans("+/", "-_"))}
        # Short forms also occur in ordinary text.
        return {self._value, *(form for form in forms if len(form) >= _CUT)}

    def __repr__(self) -> str:
        return _HIDDEN

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a secret must not be stored")


def _pieces(form: str) -> Iterator[str]:
    """All parts of `_CUT` characters; of a shorter form the whole."""
    for start in range(max(1, len(form) - _CUT + 1)):
        yield form[start : start + _CUT]


def hidden(text: object, *secrets: Secret | None) -> str:
    """`text` with every secret redacted."""
    shown = str(text)
    for secret in secrets:
        if secret is not None:
            shown = secret.hide_in(shown)
    return shown


@dataclass(frozen=True)
class Secrets:
    """The keys of a training run. They are passed separately from the settings.

    With `from_request` they are of a request to a server, and only these are used, since keys in
    the server's environment, logins and files belong to its operator. Otherwise those are defaults.
    """

    wandb_api_key: Secret | None = None
    hf_token: Secret | None = None
    from_request: bool = False
