"""Redacts secrets in URLs for messages: user, password, query and fragment are removed.

Many URLs contain a key (`?token=…`, `user:password@`). It is never shown, even if the URL is
mistyped: without https://, with spaces, or with one slash.
"""

import re

_SCHEME = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]{0,20}:[/\\]{2,}|https?:?[/\\]+|https?:)", re.I)
_HOST = re.compile(r"(?:[\w-]+(?:\.[\w-]+)*|\[[0-9A-Fa-f:.]+\])(?::\d+)?")
_BEHIND = re.compile(r"[?#&;]|%(?:3[Ff]|23|26|3[Bb])")  # where the path ends; escaped, too
_ADDRESS = re.compile(
    r"\s*(?:[^/\\\s@]{0,200}@)?[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){0,10}"
    r"\.[A-Za-z]{2,24}(?::\d{1,5})?[/\\?#]"
)


def bare_address(text: str) -> str:
    """The URL without user, password, query and fragment; scheme, host and path remain."""
    match = _SCHEME.match(text)
    scheme = match[0].strip() if match else ""
    rest = text[match.end() :] if match else text
    authority = re.split(r"[/\\?#]", rest, maxsplit=1)[0]
    host = authority.rpartition("@")[2]
    behind = rest[len(authority) :]
    # A slash in a password, or no host: everything before the last @ may be part of the password.
    doubtful = "@" not in authority and (":" in authority or "." not in authority)
    if not _HOST.fullmatch(host) or (doubtful and "@" in behind):
        host, behind = rest.rpartition("@")[2], ""
    rest = host + behind
    cut = _BEHIND.search(rest)
    return scheme + (rest[: cut.start()] if cut else rest)


def looks_like_address(text: str) -> bool:
    """Whether a text that is not a file was meant as a URL: with a scheme, or as host/path."""
    return bool(_SCHEME.match(text) or _ADDRESS.match(text))


def safe_name(text: str) -> str:
    """A file name or URL from a user, with secrets removed, for messages."""
    credentials = "@" in text and (":" in text.partition("@")[0] or "/" in text)
    if looks_like_address(text) or credentials:
        return bare_address(text)
    return text.partition("?")[0]
