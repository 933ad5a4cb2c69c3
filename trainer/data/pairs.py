"""Pairs: the control images of each training image, which an editing model learns to change.

target/fox.png and control/fox.png, or control_1/fox.png, control_2/fox.png; fox.png and
fox_control.png; fox_end.png and fox_start.png; or a table that names both. The training image is
the target: the control images after the edit.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from families.redact import safe_name
from trainer.data.auxiliary_images import Group
from trainer.data.caption_tables import Names, NoCaptions, control_rows
from trainer.data.captions import Caption
from trainer.data.example import Control, Example
from trainer.data.findings import Finding
from trainer.data.images import Checked
from trainer.data.mapped_file import Content
from trainer.data.members import (
    TABLE_SUFFIXES,
    Unusable,
    listed,
    printable,
    stem_of,
    suffix_of,
)
from trainer.settings import TrainingInputs

_START = re.compile(r"(?P<root>.+)_start(?P<number>[0-9]{0,4})")  # ROOT_end is its target
PARTS = 5  # of a name that are compared: names of untrusted archives may have hundreds
_NUMBERED = re.compile(r"(?P<stem>.+?)[-_](?P<number>[0-9]{1,4})")
NO_INSTRUCTION = "no-instruction"  # `Finding.check`
HOW = (
    "put it into a folder control (further ones into control_2, control_3) under the name of its "
    "image"
)


@dataclass
class Pairs:
    """The control images of a dataset."""

    of: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by target, in order
    controls: set[str] = field(default_factory=set)  # all of them, not trained on
    alone: list[str] = field(default_factory=list)  # control images without a target
    # Control images in tables that cannot be used: table, target, name as written.
    missing: list[tuple[str, str, str]] = field(default_factory=list)
    named: set[str] = field(default_factory=set)  # those that tables name
    roots: dict[str, str] = field(default_factory=dict)  # ROOT of each ROOT_end


def find_pairs(
    files: Mapping[str, Content], images: Sequence[str], groups: Sequence[Group], editing: bool
) -> Pairs:
    """The pairs among the images of a dataset.

    groups: of `auxiliary_images.auxiliary`. editing: whether the base model may use them; without
        it, names that end with `_start` and `_end` have no meaning.
    """
    found = Pairs()
    # Number and name of the folder, and number in it: by target and control image.
    places: dict[str, dict[str, tuple[int, str, int]]] = {}

    def add(target: str, control: str, number: int, of_folder: int = 0, folder: str = "") -> None:
        places.setdefault(target, {}).setdefault(control, (of_folder, folder, number))
        found.controls.add(control)

    for name, control, number in _in_tables(files, images, found):
        add(name, control, number)
        found.named.add(control)
    if editing:
        roots = {stem_of(name).removesuffix("_end"): name for name in images if _is_end(name)}
        starts = {n: match for n in images if (match := _START.fullmatch(stem_of(n)))}
        if any(match["root"] in roots for match in starts.values()):  # else the names mean nothing
            found.roots = {name: root for root, name in roots.items()}
            for name, match in starts.items():
                if target := roots.get(match["root"]):
                    add(target, name, int(match["number"] or 1))
                elif name not in places:
                    found.controls.add(name)
                    found.alone.append(name)
    besides = {name for group in groups if not group.used for name in group.names}
    known = set(images)
    targets = _Targets(name for name in images if name not in besides | found.controls)
    for group in groups:
        if not group.controls:
            continue
        of_folder = _number(group.folder)
        for control in group.names:
            if control not in known or control in found.controls:
                continue
            meant, own = targets.find(control, group.folder)
            for target in meant:
                add(target, control, own, of_folder, group.folder)
            if not meant:
                found.alone.append(control)
        found.controls |= set(group.names)
    found.of = {
        target: tuple(sorted(controls, key=lambda each: (*controls[each], each)))
        for target, controls in places.items()
    }
    found.controls -= set(found.of)  # the result of one edit may be what another begins with
    return found


def _in_tables(
    files: Mapping[str, Content], images: Sequence[str], found: Pairs
) -> Iterator[tuple[str, str, int]]:
    """Target, control image and its number, by the tables of a dataset."""
    names = Names(images)
    for table in sorted(name for name in files if suffix_of(name) in TABLE_SUFFIXES):
        try:
            rows = control_rows(table, files[table])
        except (NoCaptions, Unusable):
            continue  # what is wrong is found by the reader of captions
        for written, controls in rows.items():
            for target in names.find(written, table):
                for number, control in enumerate(controls):
                    meant = names.find(control, table)
                    if len(meant) == 1 and meant[0] != target:
                        yield target, meant[0], number
                    else:
                        found.missing.append((table, target, control))


def _is_end(name: str) -> bool:
    return stem_of(name).endswith("_end")


class _Targets:
    """Finds the target of a control image by its name."""

    def __init__(self, images: Iterable[str]) -> None:
        self._by_stem: dict[str, list[str]] = {}
        self._by_end: dict[str, list[str]] = {}  # by the last parts of the stem, of any number
        for name in images:
            stem = stem_of(name)
            self._by_stem.setdefault(stem, []).append(name)
            parts = stem.split("/")
            for count in range(1, min(len(parts), PARTS) + 1):
                self._by_end.setdefault("/".join(parts[-count:]), []).append(name)

    def find(self, control: str, folder: str) -> tuple[list[str], int]:
        """The targets of a control image, and its number among theirs.

        folder: of the control images; empty if its own name is derived from the target's.
        """
        stem = stem_of(control)
        if not folder:
            parent, _, own = stem.rpartition("/")
            for part in _parts(own):
                if meant := self._by_stem.get(f"{parent}/{part}" if parent else part):
                    return meant, _number(own)
            return [], 0
        inside = stem.removeprefix(f"{folder}/")
        numbered = _NUMBERED.fullmatch(inside)
        ends = [(inside, 0)]
        ends += [(numbered["stem"], int(numbered["number"]))] if numbered else []
        for end, number_of in ends:
            beside = str(PurePosixPath(folder).parent / end)
            for meant in (self._by_stem.get(beside, []), self._by_end.get(end, [])):
                if len({stem_of(each) for each in meant}) == 1:
                    return meant, number_of
        return [], 0


def _number(name: str) -> int:
    """The number at the end of a name; 0 without one."""
    match = re.search(r"[0-9]{1,4}$", name)
    return int(match[0]) if match else 0


def _parts(name: str) -> list[str]:
    """The beginnings and ends of a name between its separators, longest first."""
    places = [match.span() for match in re.finditer(r"[-_. (\[]+", name)]
    parts = [name[:start] for start, _ in places[-PARTS:]]
    parts += [name[end:] for _, end in places[:PARTS]]
    return sorted(filter(None, parts), key=len, reverse=True)


def pair_problems(
    pairs: Pairs, captions: Mapping[str, Caption], default_caption: str, least: int, most: int
) -> Iterator[Finding]:
    """Why the pairs of a dataset cannot be used.

    captions: of each image to train on, as written; of a pair it is the instruction. least, most:
    control images of each that the base model needs and takes.
    """
    images = list(captions)
    if not pairs.controls and not pairs.missing:
        if least and images:
            yield Finding(
                "base_model edits images and learns from pairs, but none of the "
                f"{len(images)} images has a control image, the image before the edit: {HOW}. To "
                "train on single images, choose a base_model that is not for editing only"
            )
        return
    without = dict.fromkeys(target for _, target, _ in pairs.missing)
    if pairs.missing:
        named = [
            f"{printable(safe_name(control)[:200])} ({table}, for {target})"
            for table, target, control in pairs.missing
        ]
        yield Finding(
            "control images that are not in the dataset, or are the training image itself: "
            f"{listed(named)}; correct these rows, or add the images",
            tuple(without),
            "its table names a control image that is not in the dataset, or is the image itself",
        )
    if pairs.alone:
        yield Finding.of_all("control images without a training image", pairs.alone)
    lacking = [name for name in images if name not in pairs.of and name not in without]
    if lacking:
        yield Finding.of_all("no control image", lacking, f"; {HOW}, or remove these images")
    for name in images:
        if len(controls := pairs.of.get(name, ())) > most:
            text = f"has {len(controls)} control images ({', '.join(controls)}); "
            yield Finding.of(name, f"{text}base_model takes at most {most}")
    mute = [name for name in images if not captions[name].text]
    if mute and default_caption == TrainingInputs.model_fields["default_caption"].default:
        text = "; write it into NAME.txt, or set default_caption to the one of all pairs"
        yield Finding.of_all("no instruction for the edit", mute, text, check=NO_INSTRUCTION)


def pair_findings(pairs: Pairs, examples: Sequence[Example]) -> Iterator[Finding]:
    """What the user should know. examples: with their control images, if these are used."""
    counts = {each.name: len(each.controls) for each in examples}
    most = max(counts.values(), default=0)
    if not most:
        if pairs.named:
            text = "ignored, because only editing models use control images"
            yield Finding.of_all(text, sorted(pairs.named))
        return
    number = sum(count > 0 for count in counts.values())
    total = sum(counts.values())
    text = f"{number} pair{'s' * (number != 1)}, with {total} control image{'s' * (total != 1)}"
    yield Finding(text, level=logging.INFO)
    if fewer := [name for name, count in counts.items() if 0 < count < most]:
        yield Finding.of_all(f"fewer control images than the {most} of others", fewer)


OTHER_RATIO = 0.05  # difference of aspect ratios from which an edit may move what it should keep
FAR_RATIO = 1.0  # twice, or half, as wide


def pair_checks(examples: Sequence[Example]) -> Iterator[Finding]:
    """Warns of pairs that teach something else than the edit."""
    same = [
        each.name
        for each in examples
        if each.data and any(control.data == each.data for control in each.controls)
    ]
    if same:
        text = "the image and its control image are the same file, so no edit is learned"
        yield Finding.of_all(text, same, check="no-edit")
    alone = [each for each in examples if len(each.controls) == 1]
    off = {each.name: _off(_ratio(each.controls[0]), _ratio(each)) for each in alone}
    text = (
        "the aspect ratio differs from the control image's, so what the edit should keep is "
        "moved or stretched, unless it shows another scene"
    )
    if far := [name for name, each in off.items() if each >= FAR_RATIO]:
        yield Finding.of_all(text, far, check="other-ratio")
    if other := [name for name, each in off.items() if OTHER_RATIO < each < FAR_RATIO]:
        yield Finding.of_all(text, other, check="other-ratio", level=logging.INFO)


def _off(one: float, other: float) -> float:
    """By how much the larger exceeds the smaller, as a share of that."""
    return max(one, other) / min(one, other) - 1


def _ratio(image: Example | Control) -> float:
    return image.width / image.height


def controls_of(
    names: Iterable[str], checked: Mapping[str, Checked | str], files: Mapping[str, Content]
) -> tuple[Control, ...]:
    """The control images of these names, which were checked."""
    found = ((name, checked[name]) for name in names)
    return tuple(
        Control(name, each.width, each.height, files[name])
        for name, each in found
        if not isinstance(each, str)
    )
