"""`zeroprior check DATASET`: prints what the checks of a dataset find, and writes the sheet.

What reads images is imported where it is needed, so that `--help` does without.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.registry import usual_base
from inference.console import clean
from inference.flags import typed
from trainer.dataset_names import bare_name, dataset_name
from trainer.outputs import OUTPUTS
from trainer.settings import Settings

if TYPE_CHECKING:
    from trainer.data import DatasetCheck, Example

FAILED = 1  # exit code if the dataset cannot be used
_FOLDER = "checks"  # in outputs/


def with_usual_base(given: dict[str, Any], config: str | None) -> dict[str, Any]:
    """The arguments, with a base model of the usual size if none is named.

    `auto` would be the small test model on a machine without a GPU, whose images are tiny.
    """
    if config is None and given.get("base_model", "auto") == "auto":
        return given | {"base_model": usual_base().name}
    return given


def check(settings: Settings, sheet: str | None = None, as_json: bool = False) -> int:
    """Checks the dataset and prints the findings; returns the exit code.

    sheet: where the HTML page is written; default: outputs/checks/NAME.html. With `as_json`, the
    result is printed as JSON, and there is a page only if `sheet` is given.
    """
    from trainer.data import check_dataset, write_sheet

    found = check_dataset(settings)
    if as_json:
        print(json.dumps(found.data(), indent=1))
    else:
        examples = found.findings.examples
        own = sum(bool(each.caption_file) for each in examples)
        used = _used(found)
        print(
            f"{_images(examples)}, {own:,} with a caption file{used}; checked for "
            f"{settings.base.name} at {max(settings.resolutions)} pixels"
        )
        for kind, those in (
            ("problem", found.problems),
            ("warning", found.warnings),
            ("suggestion", found.suggestions),
        ):
            for each in those:
                text = (
                    f"{dataset_name(settings.dataset)}: {each.text}"
                    if kind == "problem"
                    else each.text
                )
                print(clean(f"\n{kind}: {text}"))
        if not found.problems + found.warnings + found.suggestions:
            print("nothing to correct")
    if found.findings.examples and (sheet or not as_json):
        name = bare_name(Path(os.path.abspath(settings.dataset)))  # also of a folder given as .
        path = Path(sheet) if sheet else OUTPUTS / _FOLDER / f"{name}.html"
        write_sheet(found, path)
        if not as_json:
            print(f"\nwrote {path}: all images with their findings, worst first")
    return FAILED if found.problems else 0


def _images(examples: "Sequence[Example]") -> str:
    count, controls = len(examples), sum(len(each.controls) for each in examples)
    return _count(count, "image") + f", {_count(controls, 'control image')}" * bool(controls)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _used(found: "DatasetCheck") -> str:
    """The masks and regularization images of a run, if there are any."""
    masks = sum(bool(each.mask_file) for each in found.findings.examples)
    kept = len(found.findings.regularization)
    parts = [(masks, "mask"), (kept, "regularization image")]
    return "".join(
        f", {_count(number, what)} {'is' if number == 1 else 'are'} used"
        for number, what in parts
        if number
    )


def dataset_of(settings: Settings) -> "DatasetCheck | None":
    """The checked dataset of a plan; None if it does not exist here."""
    from trainer.data import check_dataset

    return check_dataset(settings) if settings.dataset.exists() else None


def summary(settings: Settings, found: "DatasetCheck | None") -> str:
    """One line for a plan: the numbers of images and findings; empty if there is no dataset.

    Also the steps of a job file that counts epochs. Raises SettingsError if there are none.
    """
    from trainer.reading import with_steps

    if found is None:
        missing = f"{settings.dataset} does not exist here, so its epochs are not counted in steps"
        return clean(missing) if settings.epochs else ""
    counts = [(len(found.problems), "problem"), (len(found.warnings), "warning")]
    parts = [f"{count} {kind}{'s' * (count != 1)}" for count, kind in counts if count]
    more = f"; {typed()['check']} {settings.given.dataset} lists them" if parts else ""
    examples = found.findings.examples
    images = _images(examples) + _used(found)
    if settings.epochs and examples:
        images += f", {with_steps(settings, examples).steps:,} steps"
    return clean(f"{dataset_name(settings.dataset)}: {', '.join([images, *parts])}{more}")
