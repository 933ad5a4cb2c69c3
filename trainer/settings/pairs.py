"""What differs in a run on pairs: images before an edit, and the edited ones (`trainer.data`)."""

from typing import TYPE_CHECKING

from trainer.settings.inputs import SettingsError

if TYPE_CHECKING:
    from trainer.settings.fields import Settings


def for_pairs(settings: "Settings") -> "Settings":
    """The settings of a run on pairs. Raises SettingsError for those that only fit single images.

    Captions are not dropped by default: without the instruction an edit has no one answer.
    `preserve: auto` is off: it generates images of prompts alone, and what would preserve edits is
    not known.
    """
    given, found = settings.given, []
    if settings.preserve and str(given.preserve).strip().lower() not in ("", "auto", "none"):
        found.append(
            f"preserve is {given.preserve}, which keeps images of prompts without control images; "
            "for pairs it is not supported: set it to off"
        )
    if settings.preserve_prompts:
        found.append("preserve_prompts are not used for pairs; remove them")
    if settings.autocaption:
        found.append(
            f"autocaption is {settings.autocaption}, which describes images, but the caption of a "
            "pair is the instruction for the edit; write it into NAME.txt, or set default_caption"
        )
    if found:
        raise SettingsError("; ".join(found))
    dropout = settings.caption_dropout if given.caption_dropout is not None else 0.0
    return settings.replace(preserve=0.0, caption_dropout=dropout)
