"""Several subjects in one LoRA: the setting `subjects`, with a token and maybe a folder for each.

`<zwx>=robot` has its images in the folder `robot` of the dataset, where TOK is `<zwx>`. `<zwx>`
alone has them in a folder of that name, `zwx` or `<zwx>`, if there is one. Other images may show
several subjects; their captions contain the tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from adapters.placeholder_token import check_distinct, check_token
from families.tokens import SUBJECT, mentions

if TYPE_CHECKING:
    from trainer.settings.inputs import TrainingInputs


@dataclass(frozen=True)
class Subject:
    """One of several subjects."""

    token: str
    folder: str = ""  # of its images, as given; empty: one with the token's name, if there is one

    def __str__(self) -> str:
        return f"{self.token}={self.folder}" if self.folder else self.token

    @property
    def folders(self) -> tuple[str, ...]:
        """Names that a folder of its images may have."""
        return (
            (self.folder,)
            if self.folder
            else (self.token, self.token.strip("<>[]{}()") or self.token)
        )

    def owns(self, name: str) -> bool:
        """Whether the file of this name lies in a folder of the subject, at any depth."""
        parents = f"/{PurePosixPath(name).parent.as_posix()}/"
        return any(f"/{folder}/" in parents for folder in self.folders if folder)


def wrong_subjects(inputs: "TrainingInputs", subjects: Sequence[Subject]) -> str | None:
    """Why `subjects` cannot be used with the other inputs, or None."""
    if not subjects:
        return "subjects is empty; remove it, or list the tokens: <zwx>,<kul>"
    if not inputs.train_placeholder_token:
        return (
            "subjects lists placeholder tokens, but train_placeholder_token is off; remove one of "
            "the two"
        )
    given, default = inputs.placeholder_token, inputs.default("placeholder_token")
    if given not in (default, subjects[0].token):
        return (
            f"placeholder_token is {given}, but subjects lists the tokens "
            f"({', '.join(each.token for each in subjects)}); remove placeholder_token"
        )
    return None


def read_subjects(given: Sequence[str]) -> tuple[Subject, ...]:
    """Parses the items of `subjects`: TOKEN or TOKEN=FOLDER.

    Raises `PlaceholderError` for invalid tokens, and ValueError for invalid folders.
    """
    subjects = []
    for each in given:
        token, equals, folder = (part.strip() for part in each.partition("="))
        folder = folder.replace("\\", "/").strip("/").removeprefix("./")
        if any(letter.isspace() for letter in token):
            raise ValueError(f"subjects: {token[:80]!r} is not one token; put a comma between two")
        check_token(token)
        if mentions(token, SUBJECT):
            raise ValueError(f"subjects: {token} contains {SUBJECT}, which means another token")
        parts = folder.split("/")
        if equals and (not folder or {".", ".."} & set(parts) or not folder.isprintable()):
            raise ValueError(
                f"subjects: {each[:80]!r} names no folder of the dataset; write TOKEN=FOLDER, such "
                "as <zwx>=robot"
            )
        subjects.append(Subject(token, folder))
    check_distinct([each.token for each in subjects])
    folders = [folder for each in subjects for folder in dict.fromkeys(each.folders)]
    if len(set(folders)) < len(folders):
        twice = next(each for each in folders if folders.count(each) > 1)
        raise ValueError(f"subjects: two of them have the folder {twice}; give each its own")
    return tuple(subjects)
