"""TOK and [trigger], the marks of the subject in captions and prompts."""

from families.tokens import SUBJECT, mentions, name_subject

TRIGGER_MARK = "[trigger]"  # ai-toolkit's, for the trigger word
NO_SUBJECT = (
    f"{SUBJECT} stands for the subject, but no placeholder token is trained and there is no "
    f"trigger_word; set trigger_word (trigger_word: {SUBJECT} keeps it as text), or set "
    "train_placeholder_token to true"
)


def marks_in(text: str) -> list[str]:
    """The marks of the subject that the text contains: TOK, [trigger]."""
    return [SUBJECT] * mentions(text, SUBJECT) + [TRIGGER_MARK] * (TRIGGER_MARK in text)


def with_trigger(caption: str, word: str) -> str:
    """The caption with [trigger] and TOK replaced by the word, or with the word before it.

    The word is put before a caption that does not contain it as a whole word: `fox` is not in
    `foxglove`.
    """
    named = name_subject(caption.replace(TRIGGER_MARK, word), word)
    return named if mentions(named, word) else f"{word} {named}".strip()


def without_mark(caption: str) -> str:
    """The caption without [trigger], as in ai-toolkit without a trigger word."""
    return " ".join(caption.replace(TRIGGER_MARK, "").split())
