"""Regularization images: of what the subject must not change, such as other persons.

They are in folders such as `reg/`, and never trained on: preservation asks for the base model's own
predictions on them (`trainer.learning.regularization`).
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from trainer.data.auxiliary_images import REGULARIZATION, Group, auxiliary
from trainer.data.captions import choose_captions
from trainer.data.example import Example
from trainer.data.findings import Finding
from trainer.data.images import Checked
from trainer.data.mapped_file import Content
from trainer.data.members import is_image


class Regularization(NamedTuple):
    """The regularization images that are used."""

    examples: list[Example]
    problems: list[Finding]
    notes: list[Finding]


def regularization(
    files: Mapping[str, Content],
    groups: Collection[Group],
    images: Sequence[str],
    most: int,
    check: Callable[[dict[str, Content]], Mapping[str, Checked | str]],
) -> Regularization:
    """At most so many of the regularization images, evenly over the sorted list.

    images: those that are trained on, which captions may be of, too. A caption is a file's, a
    table's, or the name of a folder such as `1_woman`; empty without one.
    """
    folders = [group for group in groups if group.kind == REGULARIZATION]
    names = [n for group in folders for n in _of_class(group) if is_image(n, files[n])]
    if not most or not names:
        return Regularization([], [], [])
    chosen = [names[k * len(names) // min(most, len(names))] for k in range(min(most, len(names)))]
    captions = choose_captions(files, chosen, [*images, *names])
    examples, notes = list[Example](), list[Finding]()
    checked = check({name: files[name] for name in chosen})
    for name in chosen:
        found = checked.get(name, "is beyond the limit of pixels; scale the images down")
        if isinstance(found, str):
            notes.append(Finding.of(name, f"{found}. This regularization image is not used"))
            continue
        caption = captions.of[name]
        size = found.width, found.height
        examples.append(Example(name, caption.text, *size, files[name], caption.file))
    where = ", ".join(f"{group.folder}/" for group in folders)
    text = (
        f"{len(examples)} of {len(names)} regularization images are used by preserve, and not "
        f"trained on: {where}"
    )
    notes.append(Finding(text, level=logging.INFO))
    if bare := [each.name for each in examples if not each.caption]:
        notes.append(
            Finding.of_all(
                "regularization images without a caption, which protect little; write what they "
                "show into NAME.txt, or name their folder 1_woman",
                bare,
                check="regularization",
            )
        )
    return Regularization(examples, captions.problems, notes)


def _of_class(group: Group) -> list[str]:
    """The group's images without the masks, control images and the like among them."""
    inside = {str(PurePosixPath(name).relative_to(group.folder)): name for name in group.names}
    groups = auxiliary(inside, inside)
    others = {inside[n] for each in groups if each.kind != REGULARIZATION for n in each.names}
    return [name for name in group.names if name not in others]
