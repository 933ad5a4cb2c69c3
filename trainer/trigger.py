"""What stands for the subject in captions where no placeholder token is trained.

With a trigger word it is that word, which is ordinary text. Without one, TOK and [trigger] would be
learned as the letters they are, which nobody means: they are an error.
"""

from collections.abc import Sequence
from dataclasses import replace

from families.tokens import SUBJECT, mentions, name_subject
from trainer.dataset import TRIGGER_MARK, DatasetError, Example
from trainer.members import listed

NO_SUBJECT = (
    f"{SUBJECT} stands for the subject, but no placeholder token is trained and there is no "
    f"trigger_word; set trigger_word (trigger_word: {SUBJECT} keeps it as text), or set "
    "train_placeholder_token to true"
)


def name_trigger(
    examples: Sequence[Example], word: str | None, foreign: bool = False
) -> list[Example]:
    """The examples of a run without a placeholder token, with the word in their captions.

    Without a word, captions stay as written, but a mark of the subject in one is an error. In
    `foreign` captions, those of an ai-toolkit job, [trigger] is removed and TOK is text. Raises
    `DatasetError` that names the captions.
    """
    if word is not None:
        return [replace(each, caption=with_trigger(each.caption, word)) for each in examples]
    if foreign:
        return [replace(each, caption=without_mark(each.caption)) for each in examples]
    files = dict.fromkeys(
        each.caption_file or "default_caption" for each in examples if unnamed_in(each.caption)
    )
    if files:
        marks = [mark for each in examples for mark in unnamed_in(each.caption)]
        raise DatasetError(
            f"{len(files)} captions contain {' and '.join(dict.fromkeys(marks))}: "
            f"{listed(list(files))}. {NO_SUBJECT}"
        )
    return list(examples)


def unnamed_in(text: str) -> list[str]:
    """The marks of the subject that the text holds: TOK, [trigger]."""
    return [SUBJECT] * mentions(text, SUBJECT) + [TRIGGER_MARK] * (TRIGGER_MARK in text)


def with_trigger(caption: str, word: str) -> str:
    """The caption with the word for [trigger] and TOK, and before it where it has neither.

    It counts as present only as a word of its own: `fox` is not in `foxglove`.
    """
    named = name_subject(caption.replace(TRIGGER_MARK, word), word)
    return named if mentions(named, word) else f"{word} {named}".strip()


def without_mark(caption: str) -> str:
    """The caption without [trigger], as ai-toolkit reads it without a trigger word."""
    return " ".join(caption.replace(TRIGGER_MARK, "").split())
