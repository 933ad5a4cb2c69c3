"""The trigger word of a plain LoRA: ordinary text that stands for the subject in captions."""

from collections.abc import Sequence
from dataclasses import replace

from families.tokens import mentions, name_subject
from trainer.dataset import TRIGGER_MARK, Example


def name_trigger(examples: Sequence[Example], word: str | None) -> list[Example]:
    """The examples with the word in their captions; None leaves captions as written."""
    if word is None:
        return list(examples)
    return [replace(each, caption=with_trigger(each.caption, word)) for each in examples]


def with_trigger(caption: str, word: str) -> str:
    """The caption with the word for [trigger] and TOK, and before it where it has neither.

    It counts as present only as a word of its own: `fox` is not in `foxglove`.

    An empty word takes [trigger] out, as ai-toolkit does without a trigger word.
    """
    if not word:
        return " ".join(caption.replace(TRIGGER_MARK, "").split())
    named = name_subject(caption.replace(TRIGGER_MARK, word), word)
    return named if mentions(named, word) else f"{word} {named}".strip()
