"""Reads the dataset of a run, and writes its missing captions if `autocaption` is set."""

from collections.abc import Mapping, Sequence
from functools import partial

from families.family import Family
from families.loading import load_family
from trainer.captions import captions_of_run
from trainer.data import (
    Example,
    bucket_sizes,
    name_trigger,
    opener,
    read_dataset,
)
from trainer.dataset_names import LIST_SUFFIXES
from trainer.learning import Control, by_main, find_turbo_adapter, processes
from trainer.memory import free_memory
from trainer.outputs import Run
from trainer.settings import Settings, SettingsError, for_pairs, too_many


def read_examples(
    settings: Settings, run: Run, control: Control, served: bool
) -> tuple[list[Example], list[Example]]:
    """The examples of a run, and its regularization images. served: as in `train_from_inputs`.

    Raises `DatasetError`, and SettingsError if there are too many images for a request to a server.
    """

    if served and settings.dataset.suffix.lower() in LIST_SUFFIXES:
        raise SettingsError("dataset is a table of names; send the images and the table in one zip")

    def check(count: int) -> None:
        if served and (cost := too_many(settings, count)):
            raise SettingsError(cost)

    def write(bare: Sequence[Example]) -> Mapping[str, str]:
        check(len(bare))
        with_pairs(settings, bare)  # refuses captions for pairs
        find_turbo_adapter(settings)  # found missing now, not after minutes of captions
        family_and_targets(settings)
        phase = partial(control.phase, "writing captions")
        assert settings.autocaption is not None
        ask = captions_of_run(run.folder, settings.base, settings.autocaption, phase)
        captions = by_main(lambda: ask(bare))
        free_memory()  # of the model that wrote them
        return captions

    regularized: list[Example] = []
    examples = read_dataset(
        settings.dataset,
        *settings.caption_rules,
        write if settings.autocaption else None,
        None if served else opener(settings.control_folders),
        regularized,
    )
    check(len(examples) + sum(len(each.controls) for each in examples))
    if settings.subject is None:
        examples = name_trigger(examples, settings.trigger_word, settings.foreign_captions)
    return examples, regularized


def with_pairs(settings: Settings, examples: Sequence[Example]) -> Settings:
    """The settings for these images: of pairs, if they have control images.

    Raises SettingsError if `controls` names folders, and no image has one there.
    """
    controls = max((len(each.controls) for each in examples), default=0)
    if examples and settings.pairs and not controls:
        raise SettingsError(
            f"no image of the dataset has a control image in {', '.join(settings.controls)} "
            "(controls); the file names must be equal, without the extension"
        )
    return for_pairs(settings, controls) if controls else settings


def with_steps(settings: Settings, examples: Sequence[Example]) -> Settings:
    """The settings with the steps for these images. Raises SettingsError if there are none."""
    sizes = [(each.width, each.height) for each in examples]
    buckets = bucket_sizes(sizes, settings.resolutions, settings.base.size_multiple)
    return settings.for_images(len(examples), buckets, processes().num_processes)


def family_and_targets(settings: Settings) -> tuple[Family, list[str]]:
    """The base's family, whose weights are loaded later, and the layers that the LoRA adapts.

    Raises SettingsError for targets that match no layer.
    """
    try:
        family = load_family(settings.base)
        return family, family.lora_targets(settings.lora_targets)
    except ValueError as error:
        raise SettingsError(str(error)) from error
