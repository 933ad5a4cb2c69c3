"""Puts the trigger word into captions, for runs without a placeholder token.

A trigger word is plain text that replaces TOK and [trigger]. Without a trigger word these would be
learned as plain text, so they are an error.
"""

from collections.abc import Sequence
from dataclasses import replace

from trainer.data.dataset import DatasetError, Example
from trainer.data.members import listed
from trainer.settings import NO_SUBJECT, marks_in, with_trigger, without_mark


def name_trigger(
    examples: Sequence[Example], word: str | None, foreign: bool = False
) -> list[Example]:
    """The examples of a run without a placeholder token, with the trigger word in their captions.

    Without a word, captions stay as written, but TOK or [trigger] in one is an error. In `foreign`
    captions, those of an ai-toolkit job, [trigger] is removed and TOK is plain text. Raises
    `DatasetError` that names the captions.
    """
    if word is not None:
        return [replace(each, caption=with_trigger(each.caption, word)) for each in examples]
    if foreign:
        return [replace(each, caption=without_mark(each.caption)) for each in examples]
    files = dict.fromkeys(
        each.caption_file or "default_caption" for each in examples if marks_in(each.caption)
    )
    if files:
        marks = [mark for each in examples for mark in marks_in(each.caption)]
        raise DatasetError(
            f"{len(files)} captions contain {' and '.join(dict.fromkeys(marks))}: "
            f"{listed(list(files))}. {NO_SUBJECT}"
        )
    return list(examples)
