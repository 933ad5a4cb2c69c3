"""Parses sample prompts: TOK for the subject, and options after the prompt.

`a photo of TOK --w 768 --h 1024 --s 20 --d 42 --l 4 --n blurry` sets width, height, steps, seed,
guidance scale and negative prompt of one prompt, as in kohya's scripts and ai-toolkit.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from families.tokens import name_subject
from inference.prompts import check_syntax, read_options
from inference.request import Request
from trainer.settings.subject_marks import NO_SUBJECT, TRIGGER_MARK, marks_in

log = logging.getLogger(__name__)


def read_prompts(
    prompts: Sequence[str],
    shared: Mapping[str, Any],
    subject: str | None,
    foreign: bool = False,
    tokens: Sequence[str] = (),
) -> tuple[tuple[str, ...], tuple[dict[str, Any], ...]]:
    """The prompts without their options, and the options of each; an empty tuple if none has any.

    `shared` are the options of all prompts. `subject` is the token or the trigger word that
    replaces TOK and [trigger]. Without it they are an error, or plain text if the prompts are
    `foreign`. With several `tokens` they are an error, too.
    Raises ValueError with the prompt's number.
    """
    texts, options = [], []
    for number, prompt in enumerate(prompts, start=1):
        name = f"sample prompt {number}"
        try:
            text, own, unread = read_options(prompt)
            if subject and "negative_prompt" in shared:
                own = {"negative_prompt": shared["negative_prompt"], **own}
            negatives = own.get("negative_prompt") or shared.get("negative_prompt") or ""
            marks = marks_in(f"{text} {negatives}")
            if marks and not (subject or foreign):
                raise ValueError(NO_SUBJECT)
            if marks and len(tokens) > 1:
                raise ValueError(
                    f"{marks[0]} may be any of the {len(tokens)} subjects; write the token "
                    f"instead: {', '.join(tokens)}"
                )
            if subject:
                text = name_subject(text.replace(TRIGGER_MARK, subject), subject)
                if negative := own.get("negative_prompt"):
                    own["negative_prompt"] = name_subject(negative, subject)
            if own:
                Request(prompt=text, **{**shared, **own})  # generated later, checked here
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} {prompt[:80]!r}: {error}") from error
        if unread:
            log.warning("%s: not supported, ignored: %s", name, ", ".join(unread))
        check_syntax(name, text)
        texts.append(text)
        options.append({key: value for key, value in own.items() if shared.get(key) != value})
    return tuple(texts), tuple(options) if any(options) else ()
