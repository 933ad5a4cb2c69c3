"""Where the captions of a dataset are written: next to the images, or into a new zip."""

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from adapters.files.atomic import atomic_file, atomic_path
from adapters.files.containers import Unusable, is_junk, printable, safe_parts
from trainer.data import (
    DatasetError,
    Example,
    members_of_any,
    own_captions,
    read_dataset,
    stem_of,
    suffix_of,
)
from trainer.dataset_names import bare_name, dataset_name
from trainer.run_files import CAPTIONS

Save = Callable[[str, str], None]  # name of an image, its caption
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Folder:
    """A folder: captions are written next to the images, one by one."""

    path: Path

    @property
    def log(self) -> Path:
        """Hidden, so that it is not taken for captions of a dataset."""
        return self.path / f".{CAPTIONS}"

    @contextmanager
    def opened(self, examples: Sequence[Example]) -> Iterator[tuple[Sequence[Example], Save]]:
        """The examples with their captions, and the function that writes one."""
        files: dict[str, Path] = {}  # by the printable names of `read_dataset`
        with members_of_any(self.path) as members:
            for member in members:
                files[_printed(member.name)] = self.path / member.name

        def save(image: str, caption: str) -> None:
            wanted = (f"{stem_of(image)}{suffix}" for suffix in (".txt", ".TXT", ".Txt"))
            old = next((files[name] for name in wanted if name in files), None)
            path = old or files[image].with_suffix(".txt")
            with atomic_file(path) as file:
                file.write(f"{caption}\n".encode())

        yield examples, save


@dataclass(frozen=True)
class NewZip:
    """A zip or tar, which is copied to a new zip with all captions when they are complete.

    Until then they are in the log next to it, so an interrupted command can be repeated.
    """

    source: Path
    path: Path

    @property
    def log(self) -> Path:
        """Next to the new zip."""
        return self.path.with_suffix(".jsonl")

    @contextmanager
    def opened(self, examples: Sequence[Example]) -> Iterator[tuple[Sequence[Example], Save]]:
        """The examples with their captions, and the function that keeps one for the zip.

        Captions in a new zip that exists, maybe edited, replace those of the source.
        """
        captions: dict[str, str] = {}
        if self.path.exists():
            if self.path.samefile(self.source):
                raise DatasetError(f"{self.path} is the dataset itself; give another --output")
            known = own_captions(read_dataset(self.path, default_caption=""))
            captions = {each.name: each.caption for each in known if each.caption}
        before = dict(captions)
        yield (
            [replace(each, caption=captions.get(each.name, each.caption)) for each in examples],
            captions.__setitem__,
        )
        if captions != before or not self.path.exists():
            self._write({stem_of(name): text for name, text in captions.items()})

    def _write(self, captions: dict[str, str]) -> None:
        """Copies the source with these captions, by the image's name without suffix."""
        stems = {stem: stem for stem in captions}  # as in the source, without escapes
        with atomic_path(self.path) as part, zipfile.ZipFile(part, "w") as new:
            with members_of_any(self.source) as members:
                for member in members:
                    try:
                        parts = safe_parts(member.name)
                    except Unusable:
                        continue
                    name = "/".join(parts)
                    stem = stem_of(_printed(name))
                    is_caption = suffix_of(name) == ".txt" and stem in captions
                    if stem in stems:
                        stems[stem] = stem_of(name)
                    if member.name.endswith("/") or is_junk(parts) or member.refusal or is_caption:
                        continue
                    with member.open() as file, new.open(name, "w", force_zip64=True) as copy:
                        while chunk := file.read(_CHUNK):
                            copy.write(chunk)
            for stem, text in captions.items():
                new.writestr(f"{stems[stem]}.txt", f"{text}\n")


def place_for(dataset: Path, output: Path | None) -> Folder | NewZip:
    """Where the captions of a dataset go. Raises DatasetError if it does not exist."""
    from_hub = dataset_name(dataset) != dataset.name  # its files are those of the Hub's cache
    if dataset.is_dir() and not from_hub:
        if output is not None:
            raise DatasetError(
                f"{dataset} is a folder, and its captions are written into it; remove --output"
            )
        _check_writable(dataset)
        return Folder(dataset)
    if not dataset.exists():
        raise DatasetError(f"{dataset} does not exist; give a folder, a zip or a tar of images")
    if output is None:
        name = f"{bare_name(dataset)}-captioned.zip"
        output = Path(name) if from_hub else dataset.with_name(name)
    if output.suffix.lower() != ".zip":
        raise DatasetError(f"{output} is not the name of a zip; end it with .zip")
    _check_writable(output.absolute().parent)
    return NewZip(dataset, output)


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DatasetError(f"{folder} is not a folder that can be written to")


def _printed(name: str) -> str:
    """The name of a file in `read_dataset`."""
    try:
        return printable("/".join(safe_parts(name)))
    except Unusable:
        return ""
