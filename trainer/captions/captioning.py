"""Writes the captions of a dataset into its files, or those of a run into its folder."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from families.base import Base
from families.captioners import Captioner, captioner_of, find_captioner
from families.registry import default_base, default_base_without_gpu, usual_base
from families.tokens import SUBJECT
from inference.inputs import MOST_REFERENCES
from trainer.captions.log import Log
from trainer.captions.places import Folder, Save, place_for
from trainer.captions.writing import Captioned, Model, Wishes, Writer, doubt
from trainer.data import (
    DatasetError,
    Example,
    caption_checks,
    members_of_any,
    own_captions,
    read_dataset,
)
from trainer.dataset_names import dataset_name
from trainer.run_files import CAPTIONS

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def caption_dataset(
    dataset: Path,
    base: Base | None = None,
    wishes: Wishes | None = None,
    model: str | None = None,
    output: Path | None = None,
    progress: Progress = lambda *_: None,
    save: Save | None = None,
) -> tuple[Path, Captioned]:
    """Writes captions for the images of a dataset that have none.

    dataset: a folder, whose captions are written next to the images, or a zip or tar, which is
        copied to a new zip with the captions.
    base: the base model that will be trained; its text encoder is used if it sees images.
        Default: the one that `auto` is for training.
    model: another captioner: a name, a Hub id or a folder.
    output: the new zip. Default: NAME-captioned.zip next to the dataset.
    progress: is called with the number of captions written, and of all to write.
    save: is called with the name of an image and its caption, instead of writing it.

    Returns the folder or zip with the captions, and what was written. What is done already is not
    done again. Raises `DatasetError`, `UnknownCaptioner`, `MissingModel`, `CaptionerTooLarge`, and
    OSError if a file cannot be written.
    """
    captioner = _captioner(base, model)
    place = place_for(dataset, output)
    examples = own_captions(_single_images(dataset, base))
    log_file = Log(place.log)
    writer = _writer(log_file, captioner, wishes or Wishes(), progress)
    with place.opened(examples) as (known, write):
        found = writer.write(known, save or write)
    for each in caption_checks(found.captions, (SUBJECT,)):  # a run checks its whole dataset
        log.log(each.level, "%s", each.text)
    return place.path, found


def _single_images(dataset: Path, base: Base | None) -> list[Example]:
    """The images of a dataset. Raises DatasetError if they are pairs of an editing model.

    Without a base, nothing says what control images are for, so pairs are refused, too.
    """
    read = partial(read_dataset, dataset, default_caption="", opened=members_of_any)
    most = base.most_references if base is not None else MOST_REFERENCES
    try:
        examples = read(controls=(0, most))
    except DatasetError:
        if base is not None:
            raise
        examples = read()  # control images that make no pairs are ignored, with a line in the log
    if any(each.controls for each in examples):
        raise DatasetError(
            f"{dataset_name(dataset)} contains control images, and the captions of such pairs are "
            "instructions for an edit, which this command cannot write: write them into NAME.txt, "
            "or set default_caption"
            + (
                ". To describe the images for a base model that does not edit, name it, such as "
                f"--base {usual_base().name}"
                if base is None
                else ""
            )
        )
    return examples


def doubtful(folder: Path, captions: Mapping[str, str]) -> dict[str, str]:
    """What to look at in a folder of images: those whose answer was wrong twice, with the words.

    captions: by image, on one line, empty if it has none. An edited one is not named.
    """
    rows = Log(Folder(folder).log).rows
    return {
        name: doubt(rows[name].faults)
        for name, text in captions.items()
        if name in rows and rows[name].faults and rows[name].caption == text
    }


def captions_of_run(
    folder: Path, base: Base, purpose: str, progress: Progress
) -> Callable[[Sequence[Example]], Mapping[str, str]]:
    """For `read_dataset`: writes the captions of a run, which are only in its captions.jsonl."""

    def write(examples: Sequence[Example]) -> Mapping[str, str]:
        log_file = Log(folder / CAPTIONS)
        writer = _writer(log_file, captioner_of(base, _has_gpu()), Wishes(purpose), progress)
        return writer.write(examples, lambda *_: None).captions

    return write


def _captioner(base: Base | None, model: str | None) -> Captioner:
    if model is not None:
        return find_captioner(model)
    gpu = _has_gpu()
    if base is None:
        chosen = gpu or os.environ.get("BASE_MODEL")
        base = default_base("training") if chosen else default_base_without_gpu()
    return captioner_of(base, gpu)


def _writer(log_file: Log, captioner: Captioner, wishes: Wishes, progress: Progress) -> Writer:
    def load() -> tuple[Model, int]:
        from families.loading import default_device
        from families.vision_language import choose_loading, load

        device = default_device()
        loading = choose_loading(captioner, device)
        kind = "" if loading.quantize == "none" else f" in {loading.quantize}"
        size = loading.bytes / 1e9
        log.info("captions: %s%s, about %.1f GB of memory", captioner.name, kind, size)
        return load(captioner, loading, device), loading.batch

    return Writer(log_file, wishes, captioner.identity, load, progress)


def _has_gpu() -> bool:
    from families.loading import default_device  # imports PyTorch; not needed for --help

    return default_device().type != "cpu"
