"""Reads an archive or folder of images and captions to checked examples.

All problems are found before any model is loaded, and reported together. Archives are untrusted
input: `trainer.data.members` reads them, with limits on time, memory and disk space. Independent of
buckets and latents.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from families.tokens import SUBJECT, mentions, name_subject
from inference.progress import Progress
from trainer.data.auxiliary_images import MASKS, Group, masks_of
from trainer.data.caption_files import files_of, one_line
from trainer.data.captions import Caption, choose_captions, repeats_of
from trainer.data.example import Example, own_captions
from trainer.data.findings import (
    Finding,
    caption_findings,
    description_findings,
    foreign_findings,
    repeat_findings,
)
from trainer.data.images import MAX_TOTAL_PIXELS, Checked, check, probe
from trainer.data.mapped_file import Content
from trainer.data.masks import unused, with_masks
from trainer.data.members import Opener, Unusable, listed, read_files
from trainer.data.pairs import Pairs, controls_of, pair_findings, pair_problems
from trainer.data.regularization import regularization
from trainer.data.roles import roles_of
from trainer.data.skipped_files import is_beside, left_out, why_empty
from trainer.data.subjects import owners, subject_problems
from trainer.data.threads import in_threads
from trainer.data.unread_captions import unread_captions
from trainer.dataset_names import dataset_name
from trainer.settings import TRIGGER_MARK, Subject

log = logging.getLogger(__name__)


class DatasetError(ValueError):
    """The dataset cannot be used. The message lists all problems, one per line."""


def read_dataset(
    archive: str | os.PathLike[str],
    default_caption: str,
    subject: str | None = None,
    prefix: str = "",
    suffix: str = "",
    skip_bad_images: bool = False,
    subjects: Sequence[Subject] = (),
    masks: str = "off",
    controls: tuple[int, int] = (0, 0),
    most_regularization: int = 0,
    write: Callable[[list[Example]], Mapping[str, str]] | None = None,
    opened: Opener | None = None,
    regularized: list[Example] | None = None,
) -> list[Example]:
    """The examples of a dataset, sorted by name.

    archive: a zip, tar or tar.gz file (detected by content, not by name) or a folder, flat or
        nested. Images are recognized by their content; the caption of `a.jpg` is `a.txt` next to
        it, or in another place (`trainer.data.captions`). Masks belong to their images; control
        images and similar are ignored (`trainer.data.auxiliary_images`).
    default_caption: for images without a caption, or with an empty one.
    subject: the placeholder token, which replaces TOK and [trigger] in captions. None without a
        placeholder token: captions stay as written.
    prefix, suffix: put before and after every caption as they are, without an extra space.
    skip_bad_images: skip images that cannot be read or used, with a warning. All other problems
        are still errors.
    subjects: several subjects, instead of `subject`. TOK in a caption is the token of the image's
        folder, and an error outside their folders.
    masks: what is used as masks: `auto`, `alpha` or `off` (`trainer.data.masks`).
    controls: control images of each image that the base model needs, and takes at most
        (`trainer.data.pairs`); those of a base model that takes none are ignored.
    most_regularization: the most regularization images that are used. They are added to
        `regularized`, never returned (`trainer.data.regularization`).
    opened: `trainer.data.file_lists.members_of_any`, to read a table of image files, too; not for
        datasets from requests.
    write: gets the examples with their own captions as written, empty without one, and returns
        captions by image, which are used as if they were in the caption files.

    Raises DatasetError that lists every problem, and NoSpace if the disk for temporary files is
    full. Harmless problems are logged as warnings.
    """
    path = Path(os.path.abspath(archive))  # so that a folder given as . has a name
    problems: list[str] = []
    bad: list[str] = [] if skip_bad_images else problems  # one line per bad image
    files = read_files(path, problems, bad, opened)
    checked: dict[str, Checked | str] = {}
    asked = set[str]()

    def check_images(images: dict[str, Content]) -> Mapping[str, Checked | str]:
        new = {name: data for name, data in images.items() if name not in asked}
        asked.update(new)  # each only once
        checked.update(_check(new) if new else {})
        return checked

    if write is not None and not problems:
        rules = ("", None, "", "", skip_bad_images, (), "off", controls)
        bare = examine(files, *rules, check_images=check_images)
        _refuse(path, bare)
        files |= files_of(files, write(own_captions(bare.examples)))
    found = examine(
        files,
        default_caption,
        subject,
        prefix,
        suffix,
        skip_bad_images,
        subjects,
        masks,
        controls,
        most_regularization,
        check_images=check_images,
        problems=[Finding(each) for each in problems],
        bad=[Finding(each) for each in bad] if skip_bad_images else [],
    )
    _refuse(path, found)
    for each in found.warnings:
        log.log(each.level, "%s: %s", dataset_name(path), each.text)
    if regularized is not None:
        regularized += found.regularization
    return found.examples


@dataclass(frozen=True)
class Findings:
    """The result of `examine`."""

    examples: list[Example]  # of no use if there are problems
    problems: list[Finding]
    warnings: list[Finding]
    captions: Mapping[str, Caption] = field(default_factory=dict)  # as written, of each image
    groups: Sequence[Group] = ()  # masks, regularization images and others; not trained on
    regularization: Sequence[Example] = ()  # those that are used
    pairs: Pairs = field(default_factory=Pairs)


def _refuse(path: Path, found: Findings) -> None:
    """Raises DatasetError that lists the problems, if there are any."""
    if found.problems:
        # a.jpg and a.png share a.txt, whose problem is found twice.
        lines = dict.fromkeys(f"{dataset_name(path)}: {each.text}" for each in found.problems)
        raise DatasetError("\n".join(lines))


def examine(
    files: Mapping[str, Content],
    default_caption: str,
    subject: str | None = None,
    prefix: str = "",
    suffix: str = "",
    skip_bad_images: bool = False,
    subjects: Sequence[Subject] = (),
    masks: str = "off",
    controls: tuple[int, int] = (0, 0),
    most_regularization: int = 0,
    *,
    check_images: Callable[[dict[str, Content]], Mapping[str, Checked | str]] | None = None,
    check_masks: bool = True,
    problems: Sequence[Finding] = (),
    bad: Sequence[Finding] = (),
) -> Findings:
    """Examines the files of a dataset; the settings are those of `read_dataset`.

    files: the content of captions, and of images unless `check_images` knows them: the properties
        of each image, or why it cannot be used.
    check_masks: without it, mask files are recognized by their names only.
    problems, bad: what was found while the files were read; `bad` only with `skip_bad_images`.
    """
    problems = list(problems)
    bad = list(bad) if skip_bad_images else problems
    tokens = [each.token for each in subjects] or ([] if subject is None else [subject])
    roles = roles_of(files, subjects, editing=controls[1] > 0)
    every, groups, pairs = roles.every, roles.groups, roles.pairs
    images = {name: files[name] for name in roles.trained}
    if not images and not problems and not bad:
        problems += why_empty(files, every, groups)
    own_masks = masks_of(groups, images)

    def mentioned(text: str) -> bool:
        return TRIGGER_MARK in text or any(mentions(text, each) for each in (SUBJECT, *tokens))

    about_subject = mentioned if tokens else None
    found_captions = choose_captions(files, [*images], roles.besides, about_subject, pairs.roots)
    problems += found_captions.problems
    if controls[1]:
        problems += pair_problems(pairs, found_captions.of, default_caption, *controls)
    paired = pairs.of if controls[1] else {}

    before = dict.fromkeys(control for name in images for control in paired.get(name, ()))
    checked = (check_images or _check)(images | {name: files[name] for name in before})
    examples, animated, silent, unmanaged, described = [], [], [], [], []
    only = tokens[0] if len(tokens) == 1 else None  # what TOK means outside the subjects' folders
    named: dict[str, str] = {}  # captions of each image
    mentioning = set[str]()  # images with a token in a caption
    unnamed: list[str] = []  # with TOK in the caption, which may be any of several subjects
    for name, data in images.items():
        written = found_captions.of[name]
        texts, caption_file = (written.text, *written.others), written.file
        texts = tuple(
            one_line(f"{prefix}{text or one_line(default_caption)}{suffix}") for text in texts
        )
        if tokens:
            texts = tuple(text.replace(TRIGGER_MARK, SUBJECT) for text in texts)
            owner = next((each.token for each in owners(name, subjects)), only)
            if owner is not None:
                texts = tuple(name_subject(text, owner) for text in texts)
            elif any(mentions(text, SUBJECT) for text in texts):
                around = mentions(f"{prefix} {suffix}", SUBJECT)
                source = caption_file or f"{name} (default_caption)"
                unnamed.append("caption_prefix or caption_suffix" if around else source)
            named[name] = " ".join(texts)
            with_token = [any(mentions(text, token) for token in tokens) for text in texts]
            if not all(with_token):
                silent.append(name)
            if any(with_token):
                mentioning.add(name)

        together = name, *paired.get(name, ())
        if (lost := next((each for each in together if each not in checked), None)) is not None:
            problems.append(
                Finding(
                    f"contains more than {MAX_TOTAL_PIXELS:,} pixels up to {lost}; "
                    "use fewer images or scale them down"
                )
            )
            break
        found = checked[name]
        broken = [(each, why) for each in together if isinstance(why := checked[each], str)]
        if isinstance(found, str) or broken:
            bad += [Finding.of(each, why) for each, why in broken]
            if skip_bad_images and name in named:
                del named[name]
                silent = [each for each in silent if each != name]
                mentioning.discard(name)
            continue
        if found.moves:
            animated.append(name)
        if found.bad_profile:
            unmanaged.append(name)
        if found.described:
            described.append(name)
        own_controls = controls_of(together[1:], checked, files)
        size, mask = (found.width, found.height), own_masks.get(name, "")
        own = Example(name, texts[0], *size, data, caption_file, repeats_of(name))
        own = replace(own, measures=found.measures, others=texts[1:], controls=own_controls)
        own = replace(own, transparent=found.transparent)
        examples.append(replace(own, mask_file=mask, mask=files[mask]) if mask else own)

    examples, wrong_masks, about_masks = with_masks(examples, masks, check_masks)
    problems += wrong_masks
    kept = regularization(*(files, groups, [*images], most_regularization, check_images or _check))
    problems += kept.problems

    if skip_bad_images and bad and not examples:
        problems += [*bad, Finding("contains no usable image")]
        problems += [Finding(str(group), group.names) for group in groups]
    captions = len(examples) if skip_bad_images else len(images)
    if subjects and captions:
        problems += map(Finding, subject_problems(subjects, named, list(dict.fromkeys(unnamed))))
    elif captions and tokens and not mentioning:
        problems.append(
            Finding(
                f"none of the {captions} captions mentions the subject; write TOK or {subject} "
                "into the caption files or default_caption ('a photo of TOK'), or train without a "
                "placeholder token"
            )
        )

    warnings = []
    if skip_bad_images and bad:
        lines = "\n".join(each.text for each in bad)
        count = f"{len(bad)} of {len(bad) + len(examples)} images are skipped"
        warnings.append(Finding(f"{count}:\n{lines}"))
    used = {each.mask_file for each in examples} | {each.name for each in kept.examples}
    used |= {control.name for each in examples for control in each.controls}
    warnings += pair_findings(pairs, examples)
    takes = controls[1] > 0  # then control images that are not used are problems
    shown = [g for g in groups if used.isdisjoint(g.names) and not (takes and g.controls)]
    warnings += [Finding(str(group), group.names, str(group)) for group in shown]
    of_masks = [name for each in groups if each.kind == MASKS for name in each.names]
    warnings += [*about_masks, *unused(of_masks, examples), *kept.notes]
    rest = {name: data for name, data in files.items() if not is_beside(name, groups)}
    warnings += map(Finding, unread_captions(rest, every, found_captions))
    warnings += left_out(rest, every)
    sources = {each.name: each.caption_file for each in examples}
    warnings += caption_findings(sources, found_captions.read, default_caption)
    warnings += found_captions.warnings()
    by_source = {
        name if each.file in found_captions.rows else each.file: each.text
        for name, each in found_captions.of.items()
        if each.file
    }
    by_source |= {"default_caption": default_caption, "caption_prefix": prefix}
    warnings += foreign_findings(by_source | {"caption_suffix": suffix})
    warnings += repeat_findings({each.name: each.repeats for each in examples})
    warnings += description_findings(described, sources, files)
    if unmanaged:
        warnings.append(Finding.of_all("broken color profiles are ignored", unmanaged))
    if animated:
        warnings.append(Finding.of_all("animations, only the first frame is used", animated))
    if silent:
        warnings.append(
            Finding(
                f"{len(silent)} of {len(examples)} captions do not mention the subject: "
                f"{listed(silent)}",
                tuple(silent),
                "the caption does not mention the subject",
                check="no-token",
            )
        )
    warnings = [each for each in warnings if each not in problems]
    return Findings(examples, problems, warnings, found_captions.of, groups, kept.examples, pairs)


def _check(images: dict[str, Content]) -> dict[str, Checked | str]:
    """Checks each image; the result is its properties or the reason why it cannot be used.

    Stops before the image that exceeds the limit of total pixels.
    """
    found: dict[str, Checked | str] = {}
    readable, pixels = [], 0
    for name, data in images.items():
        try:
            width, height = probe(bytes(data))
        except Unusable as error:
            found[name] = str(error)
            continue
        pixels += width * height
        if pixels > MAX_TOTAL_PIXELS:
            break
        readable.append(name)

    def checked(name: str) -> Checked | str:
        try:
            return check(bytes(images[name]))
        except Unusable as error:
            return str(error)  # not the error, which would keep the image in memory

    with Progress(total=len(readable), desc="reading images", unit="image") as progress:
        for name, result in zip(readable, in_threads(checked, readable), strict=True):
            found[name] = result
            progress.update()
    return found
