"""Checks answers of the vision-language model, and keeps the clean part of a wrong one."""

import re

from families.tokens import SUBJECT, mentions, whole_word
from trainer.captions.questions import STYLE_SET, STYLE_WORDS, Identity
from trainer.captions.words import found_in, without_quotes, words_of

LEAST_WORDS, MOST_WORDS = 5, 60
STYLE_ENDING = f", in the style of {SUBJECT}"

_HEDGES = (
    *("appear", "seem", "seemingly", "possibly", "perhaps", "probably", "maybe", "likely"),
    *("might", "could be", "may be", "suggest"),
)
_REFUSALS = re.compile(r"\b(?:sorry|cannot|can't|unable|as an ai|not able|i don't)\b")
_OPENING = re.compile(
    r"^(?:(?:here is|here's) (?:a|the|your) caption:?|caption:)\s*|"
    r"^(?:the|this|an?) (?:[\w-]+ ){0,2}(?:image|photo|photograph|picture|scene|illustration|"
    r"painting|drawing|artwork|render|rendering|sketch|cartoon)(?: here)? "
    r"(?:shows?|depicts?|features?|captures?|displays?|portrays?|presents?|is of|of):? ",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"\*\*|__|```|`|^\s*(?:#+|[-*\u2022]|\d+[.)])\s+", re.MULTILINE)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_BEGINS_A_PREDICATE = frozenset(
    "is in on at with without under underneath near by against among behind inside outside over "
    "above below beside next between in-between from towards sits stands lies rests walks runs "
    "holds looks leans hangs floats seated placed shown seen".split()
)


def tidy(text: str) -> str:
    """The answer without what code can remove safely: quotes around it, an opening."""
    text = _OPENING.sub("", text.strip())
    for first, last in ('""', "\u201c\u201d", "''"):
        if len(text) > 1 and text.startswith(first) and text.endswith(last):
            inner = text[1:-1]
            text = inner if first not in inner and last not in inner else text
    return _OPENING.sub("", text.strip()).strip()


def faults(text: str, finished: bool, purpose: str, identity: Identity) -> list[str]:
    """What is wrong with a tidy answer, as parts of a sentence; empty if it can be used."""
    words = words_of(text)
    if not words:
        return ["it was empty"]
    found = [] if finished else ["it did not end"]
    if _THOUGHT.search(text):
        found.append("it contained thoughts")
    if "\n" in text or _MARKUP.search(text):
        found.append("it was not one line of plain text")
    if not LEAST_WORDS <= len(words) <= MOST_WORDS:
        found.append(f"it had {len(words)} words")
    if _refuses(text):
        found.append("it refused")
    if _loops(text):
        found.append("it repeated itself")
    if _is_foreign(text):
        found.append("it was not in English")
    if hedges := found_in(without_quotes(text), _HEDGES):
        found.append(f"it was not certain ({', '.join(hedges)})")
    if wrong := found_in(without_quotes(text), avoided(purpose, identity)):
        found.append(f"it mentioned {', '.join(wrong)}")
    if purpose != STYLE_SET and len(re.findall(whole_word(SUBJECT), text)) > 2:
        found.append(f"it used {SUBJECT} more than twice")
    return found


def avoided(purpose: str, identity: Identity) -> tuple[str, ...]:
    """The words and phrases that a caption must not contain."""
    fixed = STYLE_WORDS if purpose == STYLE_SET else ()
    return (*identity.avoid, *fixed)


def _refuses(text: str) -> bool:
    return _REFUSALS.search(" ".join(text.lower().replace("\u2019", "'").split()[:12])) is not None


def _loops(text: str) -> bool:
    words = words_of(text)
    few = len(words) >= 10 and len(set(words)) < 0.4 * len(words)
    return few or re.search(r"(\S)\1{7}", text) is not None


def _is_foreign(text: str) -> bool:
    """Whether more than a few letters outside quotes are not Latin."""
    letters = [each for each in without_quotes(text) if each.isalpha()]
    foreign = [each for each in letters if not (each < "\u0250" or "\u1e00" <= each <= "\u1eff")]
    return len(foreign) > 0.05 * len(letters)


def with_token(text: str, purpose: str, identity: Identity) -> str:
    """The caption with TOK, which is put in by code: models leave it out now and then."""
    if purpose == STYLE_SET:
        return text.rstrip(" .,;:!") + STYLE_ENDING
    if mentions(text, SUBJECT):
        return text
    if identity.kind:
        named = rf"\b(?:the|an?|this)\s+{re.escape(identity.kind)}\b"
        text, count = re.subn(named, SUBJECT, text, count=1, flags=re.IGNORECASE)
        if count:
            return text
    first = text.split(maxsplit=1)[0].lower().strip(",.")
    if first in _BEGINS_A_PREDICATE or (first.endswith("ing") and len(first) > 5):
        return f"{SUBJECT} {text[0].lower()}{text[1:]}"
    return f"{SUBJECT}. {text}"


def clean_part(text: str, finished: bool, purpose: str, identity: Identity) -> str:
    """The sentences and clauses of a wrong answer that are right; empty if none is."""
    text = _MARKUP.sub("", _THOUGHT.sub("", text))
    text = tidy(" ".join(text.split()))
    if not finished:  # its last clause may be cut off
        text = re.sub(r"[,;.!?][^,;.!?]*$", "", text) if re.search("[,;.!?]", text) else ""
    wrong = avoided(purpose, identity)

    def right(part: str) -> bool:
        return not found_in(without_quotes(part), (*wrong, *_HEDGES)) and not _refuses(part)

    kept = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        clauses = [each for each in re.split(r"\s*[,;]\s*", sentence) if right(each)]
        if clauses := [each for each in clauses if each.strip(" .!?")]:
            kept.append(", ".join(clauses).rstrip(" ,.;"))
    while kept and len(words_of(" ".join(kept))) > MOST_WORDS:
        *clauses, _ = kept[-1].split(", ")
        kept[-1:] = [", ".join(clauses)] if clauses else []
    text = ". ".join(kept)
    if purpose != STYLE_SET:
        text = _twice_at_most(text)
    if len(words_of(text)) < LEAST_WORDS or _loops(text) or _is_foreign(text):
        return ""
    return text


def _twice_at_most(text: str) -> str:
    parts = re.split(f"({whole_word(SUBJECT)})", text)
    places = [number for number, part in enumerate(parts) if part == SUBJECT]
    for number in places[2:]:
        parts[number] = "it"
    return "".join(parts)
