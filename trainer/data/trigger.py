"""Puts the trigger word into captions, for runs without a placeholder token.

A trigger word is plain text that replaces TOK and [trigger]. Without a trigger word these would be
learned as plain text, so they are an error.
"""

from collections.abc import Callable, Sequence
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
        return [_changed(each, lambda text: with_trigger(text, word)) for each in examples]
    if foreign:
        return [_changed(each, without_mark) for each in examples]
    marked = [each for each in examples if any(map(marks_in, each.captions))]
    files = dict.fromkeys(each.caption_file or "default_caption" for each in marked)
    if files:
        texts = (text for each in marked for text in each.captions)
        marks = [mark for text in texts for mark in marks_in(text)]
        raise DatasetError(
            f"{len(files)} caption{'s contain' if len(files) > 1 else ' contains'} "
            f"{' and '.join(dict.fromkeys(marks))}: "
            f"{listed(list(files))}. {NO_SUBJECT}"
        )
    return list(examples)


def _changed(example: Example, change: Callable[[str], str]) -> Example:
    return replace(
        example, caption=change(example.caption), others=tuple(map(change, example.others))
    )
