"""What differs in a run on pairs: images before an edit, and the edited ones (`trainer.data`)."""

from typing import TYPE_CHECKING

from trainer.settings.inputs import SettingsError

if TYPE_CHECKING:
    from trainer.settings.fields import Settings


def for_pairs(settings: "Settings", controls: int) -> "Settings":
    """The settings of a run on pairs; `controls` is the most control images of a training image.

    Captions are not dropped by default: without the instruction an edit has no one answer. Raises
    SettingsError for settings that only fit single images.
    """
    if settings.autocaption:
        raise SettingsError(
            f"autocaption is {settings.autocaption}, which describes images, but the caption of a "
            "pair is the instruction for the edit; write it into NAME.txt, or set default_caption"
        )
    given = settings.given.caption_dropout is not None
    dropout = settings.caption_dropout if given else 0.0
    return settings.replace(pairs=max(controls, settings.pairs), caption_dropout=dropout)
