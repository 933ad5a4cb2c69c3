"""What differs in a run on pairs: images before an edit, and the edited ones (`trainer.data`)."""

from typing import TYPE_CHECKING

from trainer.settings.inputs import SettingsError
from trainer.settings.preservation import sort_prompts, weight_of

if TYPE_CHECKING:
    from trainer.settings.fields import Settings


WEIGHT = 2.0  # of `preserve: auto`, relative to single images (docs/preservation.md, Pairs)


def for_pairs(settings: "Settings", controls: int) -> "Settings":
    """The settings of a run on pairs; `controls` is the most control images of a training image.

    Captions are not dropped by default: without the instruction an edit has no one answer.
    `preserve: auto` is on without a token, too: the instruction says when the edit is asked for.
    Raises SettingsError for settings that only fit single images.
    """
    given, found = settings.given, []
    preserve = weight_of(given.preserve, WEIGHT * settings.base.preservation)
    if preserve and sort_prompts(settings.preserve_prompts, settings)[1]:
        found.append(
            "preserve_prompts mention the subject; for pairs, give instructions for other edits"
        )
    if settings.autocaption:
        found.append(
            f"autocaption is {settings.autocaption}, which describes images, but the caption of a "
            "pair is the instruction for the edit; write it into NAME.txt, or set default_caption"
        )
    if found:
        raise SettingsError("; ".join(found))
    dropout = settings.caption_dropout if given.caption_dropout is not None else 0.0
    controls = max(controls, settings.pairs)
    return settings.replace(pairs=controls, preserve=preserve, caption_dropout=dropout)
