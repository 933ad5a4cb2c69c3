"""Finds words and phrases in English text, also in the plural and with -ing or -ed."""

import re
from collections.abc import Iterable

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
_QUOTED = re.compile(r'"[^"]*"|\u201c[^\u201d]*\u201d')  # text that can be read in the image
_SHORTEST = 3  # letters of a stem


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; a hyphen separates two."""
    return [each.lower().replace("\u2019", "'") for each in _WORD.findall(text)]


def without_quotes(text: str) -> str:
    """The text without what is in double quotes."""
    return _QUOTED.sub(" ", text)


def found_in(text: str, phrases: Iterable[str]) -> list[str]:
    """The phrases that a text contains, as whole words in any of their forms."""
    words = [_stems(each) for each in words_of(text)]
    return [phrase for phrase in phrases if _contains(words, phrase)]


def _contains(words: list[set[str]], phrase: str) -> bool:
    wanted = [_stems(each) for each in words_of(phrase)]
    return bool(wanted) and any(
        all(a & b for a, b in zip(words[start : start + len(wanted)], wanted, strict=True))
        for start in range(len(words) - len(wanted) + 1)
    )


def _stems(word: str) -> set[str]:
    """The word, and what it may be a form of."""
    word = word.removesuffix("'s")
    found = {word}
    if word.endswith("ies"):
        found.add(f"{word[:-3]}y")
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        found.add(word[:-1])
        if re.search(r"(?:[sxzo]|ch|sh)es$", word):
            found.add(word[:-2])
    for ending in ("ing", "ed"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) >= _SHORTEST:
            found |= {stem, f"{stem}e"}
            if re.search(r"([bdgklmnprtvz])\1$", stem):  # running
                found.add(stem[:-1])
    return {each for each in found if each == word or len(each) >= _SHORTEST}
