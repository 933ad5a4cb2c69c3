"""Finds images of other programs in a dataset: masks, control images, regularization images,
samples, thumbnails.

They are recognized by the name of their folder, or by a file name derived from another image's.
They are not trained on, with a warning.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from trainer.data.members import IMAGE_SUFFIXES, UNREAD_IMAGE_SUFFIXES, listed, stem_of, suffix_of

MASKS, CONTROL, REGULARIZATION = "masks", "control images", "regularization images"
SAMPLES, THUMBNAILS = "sample images", "thumbnails"

# Names of folders in trainers and systems, without punctuation at the ends, in lower case.
_FOLDERS: dict[str, str] = {
    **dict.fromkeys(("mask", "masks", "masklabel", "masklabels", "mask_images"), MASKS),
    **dict.fromkeys(("segmentation", "segmentations", "alpha_masks", "image_masks"), MASKS),
    **dict.fromkeys(("control", "controls", "control_img", "control_imgs"), CONTROL),
    **dict.fromkeys(("control_image", "control_images", "controlnet"), CONTROL),
    **dict.fromkeys(("conditioning", "conditioning_data", "conditioning_images"), CONTROL),
    **dict.fromkeys(("conditioning_image", "conditionings"), CONTROL),
    **dict.fromkeys(
        ("reg", "regs", "reg_images", "reg_data", "reg_imgs", "reg_set"), REGULARIZATION
    ),
    **dict.fromkeys(("regularization", "regularization_images"), REGULARIZATION),
    **dict.fromkeys(("regularisation", "regularisation_images"), REGULARIZATION),
    **dict.fromkeys(("regularization_data", "class_images", "class_data"), REGULARIZATION),
    **dict.fromkeys(("class", "prior"), REGULARIZATION),
    **dict.fromkeys(("sample", "samples", "sample_images", "preview", "previews"), SAMPLES),
    **dict.fromkeys(("eadir", "thumb", "thumbs", "thumbnail", "thumbnails"), THUMBNAILS),
}
# Names that may also be part of the subject's dataset, unless they repeat its file names.
_FOLDERS_THAT_REPEAT: dict[str, str] = {
    **dict.fromkeys(
        ("canny", "depth", "depth_maps", "lineart", "normal_maps", "openpose", "scribble"), CONTROL
    ),
    **dict.fromkeys(("softedge", "pose", "poses", "hint", "hints", "edges", "normals"), CONTROL),
    **dict.fromkeys(("condition", "conditions", "cond", "conds"), CONTROL),
    **dict.fromkeys(("alpha", "alphas", "matte", "mattes"), MASKS),
}
# Last words of a folder's name with the same meaning (`fox_masks`), if it repeats file names.
_WORDS: dict[str, str] = {
    **dict.fromkeys(("mask", "masks", "masklabel", "masklabels", "segmentation"), MASKS),
    **dict.fromkeys(("control", "controls", "controlnet", "conditioning", "cond"), CONTROL),
    **dict.fromkeys(("canny", "depth", "depthmap", "depthmaps", "lineart", "openpose"), CONTROL),
    **dict.fromkeys(("scribble", "softedge"), CONTROL),
    **dict.fromkeys(("sample", "samples", "preview", "previews"), SAMPLES),
    **dict.fromkeys(("thumb", "thumbs", "thumbnail", "thumbnails"), THUMBNAILS),
}
# Words after them without meaning: `masks png`, `mask_folder`, `thumbnails_256`.
_PLAIN_WORDS = frozenset(
    "png jpg jpeg webp images image imgs img data dataset dir folder files maps map out output "
    "outputs set".split()
)
# Names of folders with regularization images: `reg_person`, `woman_class_images`.
_REGULARIZATION = re.compile(
    r"(?:^|_)(?:regs?|regulari[sz]ation|(?:class|prior)_(?:images?|imgs?|data|dir|pictures|photos))"
    r"(?:_|$)"
)
# For NAME.jpg: NAME_mask.png, NAME-masklabel.png, NAME.control.png, NAME (mask).png, mask_NAME.png.
_PARTS = "face|head|hair|body|person|subject|object|background|bg|foreground|fg|sam|alpha|binary"
_MARKS: dict[str, str] = {
    rf"(?:(?:{_PARTS}|auto|soft)[-_. ])?mask(?:s|[-_]?label)?(?:[-_. ]inv(?:erted)?)?": MASKS,
    "matte|alpha|trimap|seg(?:mentation)?": MASKS,
    "control(?:net|[-_]?ima?ge?)?": CONTROL,
    "cond(?:ition(?:ing)?)?(?:[-_]ima?ge?)?": CONTROL,
    "(?:canny|depth|lineart|(?:open|dw)?pose|scribble|softedge|edges?|hed|mlsd)(?:[-_]?map)?": (
        CONTROL
    ),
    "normal[-_]?map": CONTROL,
    "thumb(?:nail)?|preview": THUMBNAILS,
}
_MARK = [
    (re.compile(pattern.format(mark=f"(?:{mark})"), re.IGNORECASE), kind)
    for pattern in (
        r"(?P<name>.+?)[-_. ]{mark}(?:[-_]?[0-9]+)?",
        r"(?P<name>.+?)[-_. ]?[(\[]{mark}[)\]]",
        r"{mark}[-_. ](?P<name>.+)",
    )
    for mark, kind in _MARKS.items()
]


@dataclass(frozen=True)
class Group:
    """Images that do not look like training images."""

    kind: str
    folder: str  # the folder with a typical name; empty if the files have typical names
    names: tuple[str, ...]  # files, in order
    used: bool = False  # trained on, since they have captions

    @property
    def controls(self) -> bool:
        """Whether these are control images."""
        return self.kind == CONTROL and not self.used

    def __str__(self) -> str:
        other = ", not training images" if self.kind == MASKS else ""
        other += ", which only editing models use" if self.kind == CONTROL else ""
        count = f"{len(self.names)} image{'s' if len(self.names) != 1 else ''}"
        if self.used:
            return (
                f"{self.folder}/ looks like {self.kind}, but its {count} have captions and are "
                "trained on; remove the folder if they are not the subject"
            )
        if self.folder:
            return (
                f"{self.folder}/ is ignored ({count}): by its name it contains "
                f"{self.kind}{other}. To train on them, rename the folder"
            )
        return (
            f"{listed(list(self.names))}: ignored ({count}): by their names these are {self.kind} "
            f"of other images{other}. To train on them, rename the files"
        )


def auxiliary(
    files: Collection[str],
    read: Collection[str],
    captioned: Collection[str] = (),
    trained: Callable[[str], bool] = lambda _: False,
) -> list[Group]:
    """The groups of images in a dataset that are not meant to be trained on.

    read: the images among the files. captioned: those with a caption file.

    The name of a folder with all images does not count: a user's only folder may be called
    `samples`. The name of a folder whose images have captions and do not repeat other names does
    not count either, except for regularization images. Masks without an image suffix (`NAME.mask`)
    are found too. `trained` says of a folder that it is trained on whatever its name.
    """
    known = {name for name in files if suffix_of(name) in UNREAD_IMAGE_SUFFIXES} | set(read)
    # A file such as NAME.mask is an image by its content; its name alone says of what.
    images = [name for name in sorted(known) if suffix_of(name) not in _MASK_SUFFIXES]
    parents = [PurePosixPath(name).parent.as_posix() for name in images]
    common = os.path.commonpath(parents) if images else ""
    depth = 0 if common == "." else len(PurePosixPath(common).parts)

    by_folder: dict[tuple[str, str], list[str]] = {}
    for name in images:
        parts = PurePosixPath(name).parts[:-1]
        for place in range(depth, len(parts)):
            folder = "/".join(parts[: place + 1])
            if not trained(folder) and (kind := kind_of_folder(parts[place])):
                by_folder.setdefault((folder, kind), []).append(name)
                break
    inside = {name for names in by_folder.values() for name in names}
    stems = {PurePosixPath(stem_of(name)).name.casefold() for name in images if name not in inside}
    groups = []
    for (folder, kind), names in by_folder.items():
        repeated = _most(_repeats(each, stems) for each in names)
        own = _most(each in captioned for each in names)
        if not (repeated or _is_enough(PurePosixPath(folder).name)):
            continue
        used = own and not repeated and kind != REGULARIZATION
        groups.append(Group(kind, folder, tuple(names), used))

    left_out = {name for group in groups if not group.used for name in group.names}
    by_name: dict[str, list[str]] = {}
    beside = {stem_of(name) for name in images} | set(images)
    beside |= set(map(str.casefold, beside))
    for name in sorted(set(files) - left_out):
        kind = _kind_by_name(name, beside)
        own = name in captioned and suffix_of(name) not in _MASK_SUFFIXES
        if kind is not None and not own:
            by_name.setdefault(kind, []).append(name)
    if masks := by_name.get(MASKS):
        others = set(images) - left_out - {name for names in by_name.values() for name in names}
        masks += _of_removed(masks, others - set(captioned), beside)
    return groups + [Group(kind, "", tuple(names)) for kind, names in by_name.items()]


_IMAGES = IMAGE_SUFFIXES | UNREAD_IMAGE_SUFFIXES
_MASK_SUFFIXES = (".mask", ".masklabel")


def _kind_by_name(name: str, beside: Collection[str]) -> str | None:
    """The kind of a file whose name is derived from another image in its folder, or None."""
    found = _derived(name, beside)
    return found[0] if found is not None else None


def _derived(name: str, beside: Collection[str]) -> tuple[str, str] | None:
    """The kind of such a file, and the name in `beside` that it is derived from.

    The name may differ in upper and lower case, if `beside` has it in lower case.
    """
    path = PurePosixPath(name)
    if suffix_of(name) in _IMAGES:
        own = path.stem
    elif path.suffix.lower() in ("", *_MASK_SUFFIXES):
        own = path.name
    else:
        return None
    for pattern, kind in _MARK:
        match = pattern.fullmatch(own)
        meant = str(path.with_name(match["name"])) if match is not None else ""
        for each in (meant, meant.casefold()):
            if match is not None and each in beside:
                return kind, each
    return None


def _of_removed(masks: Iterable[str], others: Iterable[str], beside: Collection[str]) -> list[str]:
    """The masks of images that were removed: among the others, those named as the masks are."""
    meant: set[str] = set()
    around: set[tuple[str, str]] = set()  # the image's name
    for mask in masks:
        if (found := _derived(mask, beside)) is not None and suffix_of(mask) in _IMAGES:
            meant.add(found[1].casefold())
            own, image = _stem(mask), PurePosixPath(found[1]).name
            first = own.casefold().startswith(image.casefold())
            around.add(("", own[len(image) :]) if first else (own[: -len(image)], ""))
    return [
        name
        for name in sorted(others)
        if stem_of(name).casefold() not in meant  # it has a mask of its own
        and any(re.fullmatch(f"{re.escape(a)}.+{re.escape(b)}", _stem(name)) for a, b in around)
    ]


def _stem(name: str) -> str:
    return PurePosixPath(name).stem


# In the name of a mask or of its folder, if white is not the subject: the background, only a part
# of it, or a label.
_OTHER_WHITE = re.compile(
    r"(?:^|[\W_])(?:inv(?:ert(?:ed)?)?|bg|background|face|head|hair|trimaps?|"
    r"seg(?:mentations?)?)(?:$|[\W_])",
    re.IGNORECASE,
)


def _is_other(mask: str) -> bool:
    return _OTHER_WHITE.search(PurePosixPath(mask).name) is not None


def masks_of(groups: Collection[Group], images: Collection[str]) -> dict[str, str]:
    """The mask of each image that has one: `NAME.mask.png`, `masks/NAME.png`.

    Without masks that are white elsewhere than on the subject, as far as their names say so.
    """
    by_stem: dict[str, list[str]] = {}
    by_last: dict[str, list[str]] = {}
    for name in images:
        for own in dict.fromkeys((stem_of(name), name)):
            by_stem.setdefault(own, []).append(name)
            by_last.setdefault(PurePosixPath(own).name, []).append(name)
    for known in (by_stem, by_last):  # names that differ only in upper and lower case, if unique
        folded: dict[str, list[str]] = {}
        for own, named in known.items():
            folded.setdefault(own.casefold(), []).extend(named)
        known |= {
            own: named
            for own, named in folded.items()
            if own not in known and len(set(map(stem_of, named))) == 1
        }
    masks: dict[str, str] = {}
    for group in groups:
        if group.kind != MASKS or group.used or _is_other(group.folder):
            continue
        for mask in group.names:
            derived = _derived(mask, by_stem)
            meant = by_stem[derived[1]] if derived is not None else []
            if group.folder:
                stem = PurePosixPath(stem_of(mask))
                marks = (pattern.fullmatch(stem.name) for pattern, _ in _MARK)
                lasts = [stem.name, *(match["name"] for match in marks if match is not None)]
                # Next to the folder of masks, in the same folders; else by a unique name.
                inside = stem.parent.relative_to(group.folder)
                beside = PurePosixPath(group.folder).parent / inside
                lasts += [each.casefold() for each in lasts]
                places = [str(beside / last) for last in lasts]
                places += [each.casefold() for each in places]
                meant = next(
                    (by_stem[place] for place in places if place in by_stem),
                    next(
                        (f for last in lasts if len(f := by_last.get(last, [])) == 1),
                        [],
                    ),
                )
            for image in meant:
                # Without the image's own name, which may contain such a word.
                own = PurePosixPath(stem_of(image)).name.casefold()
                if not _is_other(stem_of(mask).casefold().replace(own, "", 1)):
                    masks.setdefault(image, mask)
    return masks


def _repeats(name: str, stems: Collection[str]) -> bool:
    """Whether a file has the name of another image, or of its mask."""
    own = PurePosixPath(stem_of(name)).name
    matches = (pattern.fullmatch(own) for pattern, _ in _MARK)
    meant = [own, *(match["name"] for match in matches if match is not None)]
    return any(each.casefold() in stems for each in meant)


def kind_of_folder(folder: str) -> str | None:
    """The kind of a folder's images by its name; some names count only for repeated file names."""
    called = _plain(folder)
    numbered = _FOLDERS.get(re.sub(r"_?[0-9]+$", "", called))
    words = called.split("_")
    while len(words) > 1 and (words[-1] in _PLAIN_WORDS or words[-1].isdigit()):
        words.pop()
    return (
        _FOLDERS.get(called)
        or (CONTROL if numbered == CONTROL else None)  # control_1: a model may take several
        or (REGULARIZATION if _REGULARIZATION.search(called) else None)
        or _FOLDERS_THAT_REPEAT.get(called)
        or _WORDS.get(words[-1])
        or (_WORDS.get(words[0]) if words[0].endswith("s") else None)  # masks_fox
    )


def _is_enough(folder: str) -> bool:
    """Whether a folder's name alone is sufficient, without repeated file names."""
    called = _plain(folder)
    numbered = re.sub(r"_?[0-9]+$", "", called)
    known = called in _FOLDERS or _FOLDERS.get(numbered) == CONTROL
    return known or _REGULARIZATION.search(called) is not None


def _plain(folder: str) -> str:
    """A folder's name in lower case, without punctuation around it."""
    return re.sub(r"[\W_]+", "_", folder.casefold()).strip("_")


def _most(these: Iterable[bool]) -> bool:
    known = list(these)
    return 2 * sum(known) >= len(known)
