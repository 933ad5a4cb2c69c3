"""Decodes text files: UTF-8, or another encoding if it is clear enough, else an error."""

import re

from adapters.files.containers import Unusable

# Encodings of editors outside of Western Europe, with their usual names. If several fit, the first
# is chosen.
_LIKELY = {
    "gb18030": "GBK",
    "cp932": "Shift-JIS",
    "big5": "Big5",
    "cp949": "EUC-KR",
    "euc_jp": "EUC-JP",
    "cp1251": "Windows-1251",
    "koi8_r": "KOI8-R",
    "cp1253": "Windows-1253",
    "cp1250": "Windows-1250",
    "cp1254": "Windows-1254",
    "cp1255": "Windows-1255",
    "cp1256": "Windows-1256",
}
_LATIN = ("cp1250", "cp1254")

_ACCENTED = "À-ÖØ-öø-ÿŒœŠšŽžŸ"
_PUNCTUATION = "‘’“”„‚‹›«»–—…•·¡¿\xa0\xad"
_SIGN = f"[^\\x00-\\x7f{_ACCENTED}{_PUNCTUATION}]"  # ° ² ½ € © …
_LETTER = f"[A-Za-z{_ACCENTED}]"
# Not in Western text, but in other text that is read as Windows-1252.
_FOREIGN = re.compile(
    f"[{_ACCENTED}]{{3}}"
    f"|(?<![A-Za-z])[{_ACCENTED}]{{2}}(?![A-Za-z])"
    f"|[{_ACCENTED}]{_SIGN}|{_SIGN}[{_ACCENTED}]|{_SIGN}{{2}}"
    f"|[A-Za-z](?:{_SIGN}|[¡¿])[A-Za-z]"
    f"|{_LETTER}[«»‹›“”„‚]{_LETTER}|{_LETTER}[„‚ˆƒ]|[ˆƒ]{_LETTER}"  # no quotes within words
    f"|(?<!\\w)[¹²³¼½¾±¶¦¨¸´¬¯]{_LETTER}"
    "|[a-z][À-ÖØ-ÞŒŠŽŸ]"  # upper case after lower case
)
# Escape sequences of ISO-2022, an encoding of ASCII bytes only.
_ISO_2022 = re.compile(rb"\x1b(?:\$[@AB]|\$\([A-D]|\$\)[ACG]|\([BIJ])")


def decode(data: bytes) -> tuple[str, str | None]:
    """The text of a file, and the encoding if it had to be guessed (None for UTF-8 and UTF-16).

    UTF-8 with or without a byte order mark; UTF-16 with one; Windows-1252 if few letters are not
    ASCII (`_is_western`). Raises `Unusable` for everything else, with the likely encoding.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):  # Notepad's "Unicode"
        try:
            text = data.decode("utf-16")
        except UnicodeDecodeError:
            text = "\0"
        guess = None
    else:
        try:
            text, guess = data.decode("utf-8-sig"), None
        except UnicodeDecodeError:
            text, guess = _western(data), "Windows-1252"
    if "\0" in text or _ISO_2022.search(data):
        likely = _with_escapes(data)
        if likely is not None:
            raise Unusable(f"is not UTF-8 (it looks like {likely}); save it as UTF-8")
        raise Unusable("is not text; save it as a UTF-8 text file")
    return text, guess


def _with_escapes(data: bytes) -> str | None:
    """The encoding of a file with NUL bytes or escape sequences; None if it is not text."""
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return None
    if _ISO_2022.search(data):
        return "ISO-2022"
    for encoding, others in (("utf-16-le", data[::2]), ("utf-16-be", data[1::2])):
        if data.count(0) < 2 or 0 in others:  # in ASCII text every second byte is 0
            continue
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if " ".join(text.split()).isprintable():
            return "UTF-16 without a byte order mark"
    return None


def _western(data: bytes) -> str:
    """The text as Windows-1252. Raises `Unusable` if another encoding is more likely."""
    if b"\0" in data:
        return "\0"
    try:
        text: str | None = data.decode("cp1252")
    except UnicodeDecodeError:
        text = None
    if text is None or not _is_western(text):
        likely = _likely(data)
        looks = f" (it looks like {likely})" if likely else ""
        raise Unusable(f"is not UTF-8{looks}; save it as UTF-8")
    return text


def _is_western(text: str) -> bool:
    """Whether so few letters are not ASCII that this can be Western European text.

    Few: at most half of all, alone or in pairs next to ASCII letters (créée, ações), and no sign
    within a word. In a Cyrillic or Greek word that is read as Windows-1252, all letters have
    accents; a Chinese, Japanese or Korean character becomes two such letters, or signs.
    """
    accented = len(re.findall(f"[{_ACCENTED}]", text))
    plain = len(re.findall("[A-Za-z]", text))
    return accented <= plain and _FOREIGN.search(text) is None


def _likely(data: bytes) -> str | None:
    """The name of the most likely other encoding of a file, or None."""
    from charset_normalizer import from_bytes  # tables of a few hundred encodings

    words = b" ".join(word for word in data.split() if not word.isascii())[:2000]
    runs = re.search(rb"[\x80-\xff]{4}", words) is not None  # rare in Latin letters
    fitting = [name for name in _LIKELY if not (runs and name in _LATIN)]
    best = from_bytes(words, cp_isolation=fitting).best()
    return _LIKELY.get(best.encoding) if best is not None else None
