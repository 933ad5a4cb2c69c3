"""Several subjects in one dataset: what TOK means in a caption, and whether each has images."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath

from families.tokens import mentions
from trainer.data.members import listed
from trainer.settings import Subject


def owners(name: str, subjects: Sequence[Subject]) -> list[Subject]:
    """The subjects in whose folder an image lies: one, none, or by mistake several."""
    return [each for each in subjects if each.owns(name)]


def is_subjects(folder: str, subjects: Sequence[Subject]) -> bool:
    """Whether a folder is a subject's own one, whatever its name means elsewhere."""
    return any(f"/{folder}".endswith(f"/{own}") for each in subjects for own in each.folders)


def subject_problems(
    subjects: Sequence[Subject], captions: Mapping[str, str], unnamed: Sequence[str]
) -> Iterator[str]:
    """One line for each problem with the subjects.

    captions: of every image, by its name. unnamed: images outside the subjects' folders, with TOK
    in their caption.
    """
    tokens = " and ".join(each.token for each in subjects)
    folders = ", ".join(f"{each.folders[-1]}/" for each in subjects)
    for name in captions:
        several = owners(name, subjects)
        if len(several) > 1:
            names = " and ".join(each.token for each in several)
            yield f"{name}: is in the folders of {names}; put it into one of them"
    if unnamed:
        yield (
            f"TOK may be any of {len(subjects)} subjects in {len(unnamed)} captions: "
            f"{listed(list(unnamed))}; write {tokens} instead, or put the images of one subject "
            f"into a folder with its name ({folders})"
        )
    for each in subjects:
        if each.folder and not any(each.owns(name) for name in captions):
            found = sorted({str(PurePosixPath(name).parent) for name in captions} - {"."})
            where = f"folders with images: {listed(found)}" if found else "there are no folders"
            yield f"the folder {each.folder} of {each.token} contains no image; {where}"
        elif not unnamed and not any(mentions(text, each.token) for text in captions.values()):
            yield (
                f"no caption contains {each.token}; write it into the captions of its images, or "
                f"put them into a folder {each.folders[-1]} with TOK in the captions"
            )
