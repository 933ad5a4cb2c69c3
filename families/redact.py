"""Addresses as messages may show them: without passwords and without what is behind the path.

A key is part of many addresses (`?token=…`, `user:password@`). It is never shown, also where the
address is mistyped: without https://, with spaces, or with one slash.
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
    """The address without user, password, query and fragment; scheme, host and path stay."""
    match = _SCHEME.match(text)
    scheme = match[0].strip() if match else ""
    rest = text[match.end() :] if match else text
    authority = re.split(r"[/\\?#]", rest, maxsplit=1)[0]
    host = authority.rpartition("@")[2]
    behind = rest[len(authority) :]
    # A slash in a password, or no host at all: whatever is before the last @ may be a part of it.
    doubtful = "@" not in authority and (":" in authority or "." not in authority)
    if not _HOST.fullmatch(host) or (doubtful and "@" in behind):
        host, behind = rest.rpartition("@")[2], ""
    rest = host + behind
    cut = _BEHIND.search(rest)
    return scheme + (rest[: cut.start()] if cut else rest)


def looks_like_address(text: str) -> bool:
    """Whether a text that names no file was meant as an address: with a scheme, or as host/path."""
    return bool(_SCHEME.match(text) or _ADDRESS.match(text))


def safe_name(text: str) -> str:
    """What a user gave as a file or an address, as a message may repeat it."""
    credentials = "@" in text and (":" in text.partition("@")[0] or "/" in text)
    if looks_like_address(text) or credentials:
        return bare_address(text)
    return text.partition("?")[0]
