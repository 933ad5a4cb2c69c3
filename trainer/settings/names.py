"""Checks names that become part of a path or file name, here or in a library."""

NAME_BYTES = 200  # file systems allow 255, including prefixes and suffixes
_RESERVED = {"CON", "PRN", "AUX", "NUL"} | {
    f"{x}{n}" for x in ("COM", "LPT") for n in "123456789¹²³"
}


def fault_of_name(text: str, most: int = 128) -> str | None:
    """Why a text is not a valid file name on every system, or None."""
    if not 1 <= len(text) <= most:
        return f"has {len(text)} characters, not 1 to {most}"
    if any(0xD800 <= ord(character) <= 0xDFFF for character in text) or not text.isprintable():
        return "contains unprintable characters"
    if any(character in text for character in "/\\:"):
        return "contains a slash, a backslash or a colon"
    if text.startswith((".", "~")) or text.endswith(".") or text != text.strip():
        return "begins with a dot, ~ or a space, or ends with a dot or a space"
    if text.partition(".")[0].strip().upper() in _RESERVED:
        return "is reserved by Windows"
    if len(text.encode()) > NAME_BYTES:
        return f"has {len(text.encode())} bytes, more than {NAME_BYTES}"
    return None
