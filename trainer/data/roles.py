"""What each image of a dataset is for: trained on, a control image, or something else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.data.auxiliary_images import Group, auxiliary
from trainer.data.caption_files import Sidecars
from trainer.data.mapped_file import Content
from trainer.data.members import is_image
from trainer.data.pairs import Pairs, find_pairs
from trainer.data.subjects import is_subjects
from trainer.settings import Subject


@dataclass(frozen=True)
class Roles:
    """The images of a dataset, by their names alone."""

    every: Sequence[str]  # all of them, sorted
    trained: Sequence[str]  # training images, which may be control images of others
    besides: frozenset[str]  # other files of images
    groups: Sequence[Group]  # masks, regularization images and others; not trained on
    pairs: Pairs

    @property
    def controls(self) -> int:
        """The most control images of one training image."""
        return max((len(self.pairs.of.get(each, ())) for each in self.trained), default=0)


def roles_of(
    files: Mapping[str, Content], subjects: Sequence[Subject] = (), editing: bool = False
) -> Roles:
    """The roles of the images among the files, of which the content of tables is read.

    editing: as in `find_pairs`.
    """
    every = [name for name in sorted(files) if is_image(name, files[name])]
    sidecars = Sidecars(files, [])
    captioned = {name for name in every if sidecars.of(name)}
    groups = auxiliary(files, every, captioned, lambda folder: is_subjects(folder, subjects))
    pairs = find_pairs(files, every, groups, editing)
    besides = {name for group in groups if not group.used for name in group.names} | pairs.controls
    trained = [name for name in every if name not in besides]
    return Roles(every, trained, frozenset(besides), groups, pairs)
