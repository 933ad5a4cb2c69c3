"""Checks captions: equal ones, words that take the place of the token, failed answers of caption
models, lengths and scripts. Imports no tokenizer.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from families.tokens import split_words
from trainer.data.findings import Finding
from trainer.data.members import listed

LEAST_CAPTIONS = 3  # fewer show no pattern
PHRASE_WORDS = 3
PHRASE_SHARE = 0.8  # of the captions
CLASS_SHARE = 0.5
EQUAL_SHARE = 0.5
SCRIPT_SHARE = 0.2  # at most, of captions in other scripts than the rest

# Words without a look of their own: a phrase of these alone names no subject.
_FRAME = frozenset(
    "a an the of in on at to by for from with and or is are as it its this that there one some "
    "photo photograph photography picture image shot view close up closeup portrait style "
    "illustration drawing painting render rendering detailed showing shows depicting".split()
)
# Words next to a token that are not its class: positions, pronouns, verbs in other forms than -ing.
_NOT_A_CLASS = _FRAME | frozenset(
    "near next under over above below behind before beside between front inside outside into onto "
    "through across against around along while who which where when then not no has have had was "
    "were be being been he she they his her their my your our left right sits stands lies looks "
    "wears holds walks runs smiles faces seen alone again only also two three other another "
    "same".split()
)
# A phrase that begins with one of these names a place, which belongs into captions.
_PLACES = frozenset("on in at under near behind against beside inside outside next".split())
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+")
_ENDS = re.compile(r"[.,;:!?()\[\]\"“”\n]+")

# Texts that caption models return instead of a caption, and what to call them.
_FAULTS: dict[str, re.Pattern[str]] = {
    "is an unfinished thought": re.compile(r"</?think(?:ing)?>", re.IGNORECASE),
    "is a refusal": re.compile(
        r"\bI(?: am|['’]m) (?:very |so )?(?:sorry|unable|not able|afraid)\b"
        r"|\bI (?:can(?:['’]t|not| not)|won['’]t|am unable to|must decline)\b"
        r"|^\W*(?:sorry|apologies)\b|\bas an AI\b|\bas a language model\b"
        r"|\b(?:unable|cannot|not able) (?:to )?"
        r"(?:assist|comply|help with|identify|describe|provide)\b"
        r"|抱歉|无法(?:识别|描述|提供|协助)",
        re.IGNORECASE,
    ),
    "talks about itself": re.compile(
        r"^\W*(?:sure\b|certainly\b|of course\b"
        r"|here(?: is|['’]s) (?:a|an|the|your)\b.{0,40}\b(?:caption|description)\b)",
        re.IGNORECASE,
    ),
    # The same character, word or phrase again and again.
    "repeats itself": re.compile(
        r"([^\s.\-_=*#])\1{7}|\b(\w+)(?:\W+\2\b){4}|\b(\w+(?:\W+\w+){1,11})(?:\W+\3\b){3}"
    ),
    # UTF-8 that was read as another encoding, and characters that were lost.
    "contains broken characters": re.compile("\ufffd|â€[™œ\x9d“”˜]|Ã[©¨¤¶¼±]|ï¿½"),
}
_FAILED = "it looks like a failed answer of a caption model; write it again"
_CHECKED_CHARACTERS = 4_000  # of a caption, for the patterns above
_REMEDY = {
    "contains broken characters": "save the text as UTF-8",
    "repeats itself": "write it again; only its start has an effect",
}


def fault_of(caption: str) -> str | None:
    """Why a text is no caption: `is a refusal`, `repeats itself`, …; None for a caption."""
    head = caption[:_CHECKED_CHARACTERS]
    return next((fault for fault, pattern in _FAULTS.items() if pattern.search(head)), None)


def caption_checks(
    captions: Mapping[str, str], words: Sequence[str], limit: int | None = None
) -> Iterator[Finding]:
    """Warnings about the captions of images.

    captions: own captions by image, without prefix and suffix, those of `default_caption` not
        included. words: tokens or trigger word of the subject. limit: of the text encoder, in
        tokens; None if the captions are counted elsewhere.
    """
    faults: dict[str, list[str]] = {}
    for name, caption in captions.items():
        if fault := fault_of(caption):
            faults.setdefault(fault, []).append(name)
    for fault, names in faults.items():
        remedy = _REMEDY.get(fault, _FAILED)
        yield Finding.of_all(f"the caption {fault}; {remedy}", names, check="no-caption")

    good = {n: c for n, c in captions.items() if not any(n in names for names in faults.values())}
    equal = [*_equal(good)]
    yield from equal
    if words and not equal and len(good) >= LEAST_CAPTIONS:
        parts = {name: _parts(caption, words) for name, caption in good.items()}
        yield from _phrases(parts, words)
        yield from _class_words(good, words)
    yield from _scripts(good)
    if limit is not None:
        long = {n: count for n, c in captions.items() if (count := least_tokens(c)) > limit}
        if long:
            text = (
                f"the caption is longer than the {limit} tokens that the text encoder reads; "
                "shorten it, the rest has no effect"
            )
            shown = listed([f"{name} ({count} or more)" for name, count in long.items()])
            yield Finding(f"{text}: {shown}", tuple(long), text, check="too-long")


def least_tokens(caption: str) -> int:
    """A lower bound of a caption's tokens: the parts into which Qwen's tokenizers split first.

    These are words with at most one other character before them, single digits, and runs of
    punctuation. Parts are never joined.
    """
    return len(re.findall(r"(?:[^\w\r\n]|_)?[^\W\d_]+|\d|(?:[^\w\s]|_)+", caption))


def _equal(captions: Mapping[str, str]) -> Iterator[Finding]:
    counts = Counter(captions.values())
    if not counts:
        return
    text, count = counts.most_common(1)[0]
    if count < LEAST_CAPTIONS or count <= EQUAL_SHARE * len(captions):
        return
    names = [name for name, caption in captions.items() if caption == text]
    which = f"all {count}" if count == len(captions) else f"{count} of {len(captions)}"
    yield Finding.of_all(
        f"{which} captions are equal ({_short(text)}), so everything in the images is learned as "
        "part of the subject; describe what differs",
        names,
        check="equal-captions",
    )


def _phrases(parts: Mapping[str, list[list[str]]], words: Sequence[str]) -> Iterator[Finding]:
    """Phrases without the token in most captions: the subject is learned under them instead."""
    least = max(LEAST_CAPTIONS, PHRASE_SHARE * len(parts))
    runs = {name: set(_ngrams(each)) for name, each in parts.items()}
    counts = Counter(run for each in runs.values() for run in each)
    common = {run for run, count in counts.items() if count >= least}
    # Consecutive common runs of three words are one longer phrase.
    phrases = Counter(phrase for each in parts.values() for phrase in set(_joined(each, common)))
    found: list[tuple[str, ...]] = []
    for phrase, _ in sorted(phrases.items(), key=lambda each: (-len(each[0]), -each[1])):
        if set(phrase) <= _FRAME or phrase[0] in _PLACES:
            continue
        if not any(_within(phrase, longer) for longer in found):
            found.append(phrase)
    for phrase in found[:3]:
        names = [name for name, each in parts.items() if any(_within(phrase, seg) for seg in each)]
        if len(names) < least:
            continue
        which = f"all {len(names)}" if len(names) == len(parts) else f"{len(names)} of {len(parts)}"
        yield Finding.of_all(
            f"“{' '.join(phrase)}” is in {which} captions, so what it describes is learned under "
            f"these words and not under {words[0]}; remove it where it describes the subject",
            names,
            check="names-the-subject",
        )


def _class_words(captions: Mapping[str, str], words: Sequence[str]) -> Iterator[Finding]:
    """A word beside the token in many captions, such as its class: TOK robot."""
    beside: dict[tuple[str, str], list[str]] = {}  # images by word and token
    for name, caption in captions.items():
        pieces = split_words(caption, words)
        near: dict[tuple[str, str], None] = {}
        for number, piece in enumerate(pieces):
            if piece not in words:
                continue
            before = re.search(r"([^\W\d_]+)\s*$", pieces[number - 1]) if number else None
            after = re.match(r"\s+([^\W\d_]+)", "".join(pieces[number + 1 : number + 2]))
            near |= dict.fromkeys((match[1].lower(), piece) for match in (before, after) if match)
        for word, token in near:
            if len(word) > 2 and not word.endswith(("ing", "ly")) and word not in _NOT_A_CLASS:
                beside.setdefault((word, token), []).append(name)
    for (word, token), names in sorted(beside.items(), key=lambda each: -len(each[1]))[:2]:
        if len(names) >= max(LEAST_CAPTIONS, CLASS_SHARE * len(captions)):
            yield Finding.of_all(
                f"“{word}” is next to {token} in {len(names)} of {len(captions)} captions, so "
                "what is learned also depends on that word; remove it if it names the subject",
                names,
                check="class-word",
            )


def _scripts(captions: Mapping[str, str]) -> Iterator[Finding]:
    """Few captions in another script than the others."""
    scripts = {name: script for name, text in captions.items() if (script := script_of(text))}
    if len(scripts) < LEAST_CAPTIONS:
        return
    usual, _ = Counter(scripts.values()).most_common(1)[0]
    others = {name: script for name, script in scripts.items() if script != usual}
    if others and len(others) <= max(1, SCRIPT_SHARE * len(scripts)):
        text = f"the caption is not in the script of the others ({usual}); check its text"
        shown = listed([f"{name} ({script})" for name, script in others.items()])
        yield Finding(f"{text}: {shown}", tuple(others), text, check="script")


def script_of(text: str) -> str | None:
    """The script of most letters: Latin, Cyrillic, Chinese or Japanese, …; None without letters."""
    counts: Counter[str] = Counter()
    for letter in text[:_CHECKED_CHARACTERS]:
        if letter.isalpha():
            name = "LATIN" if letter.isascii() else unicodedata.name(letter, "UNKNOWN").split()[0]
            # A Chinese character says as much as a word.
            east = name in ("CJK", "HIRAGANA", "KATAKANA")
            counts["Chinese or Japanese" if east else name.capitalize()] += 3 if east else 1
    return counts.most_common(1)[0][0] if counts else None


def _parts(caption: str, words: Sequence[str]) -> list[list[str]]:
    """The caption's words in lower case, in parts between its punctuation and the tokens."""
    pieces = [piece for piece in split_words(caption, words) if piece not in words]
    return [
        [word.lower() for word in _WORD.findall(part)] for p in pieces for part in _ENDS.split(p)
    ]


def _ngrams(parts: Sequence[Sequence[str]]) -> Iterator[tuple[str, ...]]:
    for part in parts:
        for start in range(len(part) - PHRASE_WORDS + 1):
            yield tuple(part[start : start + PHRASE_WORDS])


def _joined(
    parts: Sequence[Sequence[str]], common: set[tuple[str, ...]]
) -> Iterator[tuple[str, ...]]:
    """The longest phrases of a caption whose runs of three words are all common."""
    for part in parts:
        start = 0
        while start + PHRASE_WORDS <= len(part):
            end = start
            while tuple(part[end : end + PHRASE_WORDS]) in common:
                end += 1
            if end > start:
                yield tuple(part[start : end + PHRASE_WORDS - 1])
            start = end + 1


def _within(phrase: Sequence[str], longer: Sequence[str]) -> bool:
    """Whether a phrase is a part of a longer one."""
    return f" {' '.join(phrase)} " in f" {' '.join(longer)} "


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else f"{text[:most]}…")
