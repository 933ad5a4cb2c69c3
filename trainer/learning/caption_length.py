"""Finds captions and sample prompts beyond the text encoder's limit.

Needs only the tokenizer, before a model's weights are loaded.
"""

import logging
from collections.abc import Mapping, Sequence

import torch

from families.family import Family
from families.text_limit import cut
from families.tokens import Cut, mentions
from inference.prompts import check_length
from trainer.data import DatasetError, Example, listed
from trainer.settings import Settings

log = logging.getLogger(__name__)

NAMED = 20  # captions that are listed with the words that are cut off


def check_texts(
    examples: Sequence[Example],
    sample_prompts: Sequence[Mapping[str, str]],
    family: Family,
    settings: Settings,
) -> None:
    """Warns of every caption and sample prompt that is too long, with the first words cut off.

    `sample_prompts` are the texts of each preview image, by name (`inference.prompts.prompts_of`).

    Raises `DatasetError` if the token (or the trigger word) is cut off in all captions with it.
    """
    vectors = {token: torch.zeros(1, 1) for token in settings.tokens}
    word = settings.trigger_word or None
    words = settings.tokens or ((word,) if word else ())
    captions = dict.fromkeys(text for example in examples for text in example.captions)
    cuts = {text: found for text in captions if (found := cut(family, text, vectors)) is not None}
    if cuts:
        _check_captions(examples, cuts, words, family.max_text_tokens)
    for number, texts in enumerate(sample_prompts, start=1):
        named = {f"sample prompt {number}, {k}": text for k, text in texts.items()}
        check_length(family, named, vectors, None if settings.tokens else word)
    for number, text in enumerate(settings.preserve_prompts, start=1):
        check_length(family, {f"preservation prompt {number}": text}, vectors, None)


def _check_captions(
    examples: Sequence[Example], cuts: dict[str, Cut], words: Sequence[str], limit: int
) -> None:
    sources: dict[str, dict[str, None]] = {}  # files of each caption that is too long
    texts = [(text, each.caption_file) for each in examples for text in each.captions]
    for text, file in texts:
        if text in cuts:
            sources.setdefault(text, {})[file or "default_caption"] = None
    lines = [
        f"{listed(list(files), 3)}: {cuts[text].first_lost()!r}" for text, files in sources.items()
    ]
    for word in words:
        lost = [text for text in cuts if mentions(text, word) and not cuts[text].keeps(word)]
        without = [name for text in lost for name in sources[text]]
        held = any(mentions(cuts[text].kept if text in cuts else text, word) for text, _ in texts)
        if lost and not held:
            raise DatasetError(
                f"no caption mentions {word} within the text encoder's limit of {limit} tokens: "
                f"{listed(without)}; move it to the start of the captions"
            )
        if lost:
            log.warning(
                "%s is beyond the limit of %d tokens, so it has no effect in these captions: %s; "
                "move it to their start",
                *(word, limit, listed(without)),
            )
    more = f"\n  and {len(lines) - NAMED:,} more" if len(lines) > NAMED else ""
    log.warning(
        "%d captions are longer than the limit of %d tokens; cut off from:\n  %s%s",
        *(len(lines), limit, "\n  ".join(lines[:NAMED]), more),
    )
