"""Checks the settings of a new run, and creates its folder: run.json, the dataset, studio.json.

The dataset is linked into the run's folder, so later edits do not change a run that is waiting or
resumed. A request names datasets by their names, and never a path.
"""

import os
import re
import shutil
import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters.files.atomic import atomic_file
from families.registry import UnknownBase, find_base
from inference.input_fields import Interface, number_of, parts_of
from studio.dataset_files import place_of
from studio.folder import Studio, entry_path, folder_fd
from studio.gpu import automatic_base
from studio.replies import Problem
from studio.summaries import facts_of, write_facts
from trainer.data import IMAGE_SUFFIXES, DatasetError, opener, read_dataset, suffix_of
from trainer.events import as_json
from trainer.outputs import name_of, new_folder
from trainer.run_files import BEGUN, CHECKPOINTS, PROGRAM, RECORD, record_of
from trainer.settings import Settings, SettingsError, TrainingInputs, resolve

DATASET = "dataset"  # in the run's folder
# Set by the server, or about accounts, paths and other machines.
NOT_OFFERED = frozenset(
    ("dataset", "output_dir", "resume_from", "name", "hf_repo_id", "allow_failed_checks")
    + ("wandb_project", "wandb_run", "wandb_entity", "log_prompt_ids", "subjects")
    + ("training",)  # full: the page shows no result without weights.zip
)
OFFERED = tuple(
    name
    for name, each in TrainingInputs.inputs().items()
    if name not in NOT_OFFERED and each.on != Interface.PYTHON
)
# Of a job file, which only a run of the command line has. `epochs` are steps by now.
FROM_JOBS = frozenset(
    name for name, each in TrainingInputs.inputs().items() if each.on == Interface.PYTHON
) - {"epochs"}
TRACKERS = ("tensorboard",)

Chosen = Sequence[Mapping[str, Any]]  # datasets: name and token


def field_of(text: str) -> str | None:
    """The setting that an error message is about: the first one that it names."""
    names = TrainingInputs.inputs()
    aliases = {"sample": "sample_prompts", "preservation": "preserve_prompts"}
    for word in re.findall(r"[a-z_]+", text):
        if word in names:
            return word
        if word in aliases:
            return aliases[word]
    return "placeholder_token" if "token" in text else None


def refused(error: Exception | str, field: str | None = None) -> Problem:
    """The answer to settings that are refused, in the command line's words."""
    text = str(error)
    return Problem(422, text, field or field_of(text))


def checked_settings(
    studio: Studio, settings: Any, datasets: Any, kept: Mapping[str, Any] | None = None
) -> Settings:
    """The settings of a run on these datasets. Raises `Problem` 422 with the field.

    `kept`: settings of an earlier run that the page does not offer.
    """
    chosen = checked_datasets(studio, datasets)
    if not isinstance(settings, dict):
        raise Problem(400, "settings must be an object")
    given = {name: _value(name, value) for name, value in settings.items() if value is not None}
    for name in given:
        if name not in OFFERED:
            raise refused(f"unknown input {name[:80]!r}; it cannot be set here", name[:80])
    base = given.get("base_model", "auto")
    given["base_model"] = automatic_base().name if base == "auto" else base
    wanted = given.get("trackers")
    if wanted not in (None, "", [], *TRACKERS, [*TRACKERS]):
        raise refused("trackers: only tensorboard can be used here", "trackers")
    if isinstance(controls := given.get("controls"), str | list):
        given["controls"] = _in_dataset(studio, chosen, controls)
    given |= _subjects(chosen, given) | dict(kept or {})
    try:
        if isinstance(base, str):
            found = find_base(str(given["base_model"]))  # a known one, never a folder
            adapters = ("auto", "none", *found.training_adapters)
            if given.get("turbo_adapter", "auto") not in adapters:
                raise refused(
                    f"turbo_adapter is {str(given['turbo_adapter'])[:80]!r}; for {found.name} it "
                    f"must be one of {', '.join(adapters)}",
                    "turbo_adapter",
                )
        return resolve(TrainingInputs(**given))
    except UnknownBase as error:
        raise refused(error, "base_model") from None
    except (ValueError, SettingsError) as error:
        raise refused(error) from None


def _in_dataset(studio: Studio, chosen: Chosen, named: str | Sequence[str]) -> list[str]:
    """Folders of control images, which are in the dataset. Raises `Problem` 422."""
    if len(chosen) > 1:
        text = "controls names folders of one dataset; with several, call them control, control_2"
        raise Problem(422, text, "controls")
    dataset = chosen[0]["name"]
    try:
        folders = ["/".join(entry_path(each.strip("/"))) for each in parts_of(named, ",")]
        for each in folders:
            with folder_fd(place_of(studio, dataset), each.split("/")):
                pass
    except Problem as problem:
        text = f"controls must be folders in {dataset}, such as before: {problem}"
        raise Problem(422, text, "controls") from None
    return folders


def control_places(settings: Settings, folder: Path) -> list[Path]:
    """The folders of control images, in the folder of the run."""
    return [folder / settings.dataset / each for each in parts_of(settings.given.controls, ",")]


def _value(name: str, value: Any) -> Any:
    """A number that a form sends as text."""
    if name in OFFERED and isinstance(value, str) and str not in TrainingInputs.types(name):
        number = number_of(value, TrainingInputs.types(name))
        return value if number is None else number
    return value


def checked_datasets(studio: Studio, datasets: Any) -> list[dict[str, Any]]:
    """The chosen datasets with the tokens of their subjects. Raises `Problem`."""
    if not isinstance(datasets, list) or not datasets:
        raise Problem(422, "choose a dataset", "dataset")
    chosen = []
    for each in datasets[:64]:
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            raise Problem(400, "a dataset needs a name")
        name, token = each["name"], each.get("token") or None
        try:
            place_of(studio, name)
        except Problem as problem:
            if problem.status != 404:
                raise
            raise Problem(422, f"there is no dataset {name[:120]}", "dataset") from None
        if token is not None and not isinstance(token, str):
            raise Problem(400, "the token must be text")
        chosen.append({"name": name, "token": token})
    names = [each["name"] for each in chosen]
    if len(set(names)) < len(names):
        raise Problem(422, "a dataset is listed twice; remove one", "dataset")
    return chosen


def _subjects(chosen: Chosen, given: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that name the datasets and their subjects; paths are those in the run's folder."""
    tokens = [each["token"] for each in chosen]
    if len(chosen) == 1:
        named = {"dataset": Path(DATASET) / chosen[0]["name"]}
        plain = given.get("train_placeholder_token") is False or tokens[0] is None
        return named if plain else {**named, "placeholder_token": tokens[0]}
    if given.get("train_placeholder_token") is False or not any(tokens):
        return {"dataset": Path(DATASET)}
    pairs = [
        f"{each['token']}={_subfolder(number, each['name'])}"
        for number, each in enumerate(chosen, start=1)
        if each["token"]
    ]
    return {"dataset": Path(DATASET), "subjects": pairs}


def _subfolder(number: int, name: str) -> str:
    """A dataset's folder in a run of several: plain, since `subjects` uses commas and spaces."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return f"{number}-{re.sub(r'[^A-Za-z0-9]+', '-', plain).strip('-') or 'images'}"


def check_images(studio: Studio, settings: Settings, chosen: Chosen, folder: Path) -> int:
    """Reads the linked dataset as the trainer does; the number of images. Raises `Problem` 422."""
    try:
        examples = read_dataset(
            folder / settings.dataset,
            *settings.caption_rules,
            opened=opener(control_places(settings, folder)),
        )
    except DatasetError as error:
        raise Problem(422, str(error), "dataset") from None
    return len(examples)


def create(
    studio: Studio,
    settings: Settings,
    chosen: Chosen,
    facts: Mapping[str, Any],
    resume_from: Path | None = None,
) -> Path:
    """Creates the folder of a queued run. It is a run once its run.json is complete."""
    name = name_of(Path(chosen[0]["name"]))
    folder, _ = new_folder(studio.outputs, name)
    try:
        link_datasets(studio, chosen, folder / DATASET)
        images = check_images(studio, settings, chosen, folder)
        given = settings.given.model_dump(exclude_unset=True)
        used = settings.for_images(images).model_dump(exclude={"base", "given"})
        used["controls"] = control_places(settings, folder)
        if resume_from is not None:
            given["resume_from"] = str(resume_from)
        write_facts(
            folder,
            created=round(time.time(), 3),
            datasets=list(chosen),
            settings=as_json({k: v for k, v in given.items() if k in OFFERED}),
            images=images,
            **facts,
        )
        record = {
            "program": PROGRAM,
            BEGUN: False,
            "settings": {"given": given, "used": used | {"base": settings.base.name}},
            "dataset": {"path": folder / settings.dataset},
        }
        write_record(folder, record)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # nothing has seen it
        raise
    return folder


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json of a queued run."""
    import json

    with atomic_file(folder / RECORD) as file:
        text = json.dumps(as_json(dict(record)), indent=2, ensure_ascii=False)
        file.write(text.encode(errors="backslashreplace"))


def link_datasets(studio: Studio, chosen: Chosen, place: Path) -> None:
    """Links the images of the datasets below `place`; copies them where links are not possible.

    Captions are copied: the studio replaces files, but editors write into them.
    """
    for number, each in enumerate(chosen, start=1):
        name = each["name"] if len(chosen) == 1 else _subfolder(number, each["name"])
        source = place_of(studio, each["name"])
        for folder, folders, files in os.walk(source):
            folders[:] = [f for f in folders if not f.startswith(".")]
            target = place / name / Path(folder).relative_to(source)
            target.mkdir(parents=True, exist_ok=True)
            for file in files:
                if not file.startswith(".") and not os.path.islink(os.path.join(folder, file)):
                    _link(Path(folder, file), target / file)


def _link(source: Path, target: Path) -> None:
    if suffix_of(source.name) in IMAGE_SUFFIXES:
        try:
            os.link(source, target, follow_symlinks=False)
            return
        except OSError:
            pass
    shutil.copyfile(source, target)


def again(studio: Studio, folder: Path, more: int | None = None) -> tuple[Settings, Any, Any]:
    """Settings, datasets and the checkpoints of a run, to begin it again or to continue it.

    `more` is the number of further steps.
    """
    facts, record = facts_of(folder), record_of(folder)
    try:
        before = record["settings"]["given"]
        given = {k: v for k, v in before.items() if k in OFFERED}
        kept = {k: v for k, v in before.items() if k in FROM_JOBS}
        used = record["settings"]["used"]
        epochs = before.get("epochs") or {}
        given |= {name: used[name] for name in epochs if name in OFFERED}  # of a job file
    except (KeyError, TypeError, AttributeError):
        raise Problem(409, f"{folder.name}/run.json does not contain the settings") from None
    if used.get("training", usual := TrainingInputs.default("training")) != usual:
        raise Problem(409, f"{folder.name} trained the whole model; begin it on the command line")
    given["base_model"] = used.get("base", "auto")
    if more is not None:
        given["steps"] = int(used.get("steps") or 0) + more
        given["seed"] = used.get("seed")
    chosen = facts.get("datasets")
    if not chosen:
        path = Path(str((record.get("dataset") or {}).get("path")))
        if path.parent not in studio.dataset_folders:
            raise Problem(
                409,
                f"{folder.name} was trained on {path.name}, which is not a dataset of this studio",
                None,
                "add the images as a dataset, and start a new run",
            )
        several = bool(before.get("subjects"))  # in the folders of one dataset
        token = None if several else used.get("placeholder_token")
        chosen = [{"name": path.name, "token": token}]
    if before.get("subjects") and len(chosen) == 1:
        kept["subjects"] = before["subjects"]
    settings = checked_settings(studio, given, chosen, kept)
    return settings, chosen, folder / CHECKPOINTS if more is not None else None
