"""python -m trainer [CONFIG.yaml] [DATASET]: trains with a settings file, options, or both."""

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from inference.console import begin, log_to_console, one_message
from inference.flags import Parser, add_inputs, typed
from trainer.checking import check, dataset_of, summary, with_usual_base
from trainer.dataset_names import hub_dataset, safe_source
from trainer.inbox import COMMAND_NAMES
from trainer.lock import FolderRefused, claim_handed_down
from trainer.outputs import OUTPUTS
from trainer.settings import (
    GROUPS,
    JOB_SUFFIXES,
    Settings,
    SettingsError,
    TrainingInputs,
    parse,
    program_of,
    read_config,
    resolve,
)

Result = TypeVar("Result")

DESCRIPTION = """\
Train a LoRA and a placeholder token from 10 to 40 images.
The result is weights.zip, for `{generate} --weights` and for predict.
"""

EPILOG = """\
Example:
  {check} imgs.zip                      images and captions, no GPU needed
  {plan} configs/z_image_turbo.yaml     memory and time, no GPU needed
  {train} configs/z_image_turbo.yaml imgs.zip
  {train} imgs.zip --base z-image-turbo --steps 800
  {generate} --weights outputs/latest/weights.zip --prompt "a photo of <zwx>"

A dataset is a zip, a tar or a folder of images, with an optional caption in
NAME.txt next to NAME.jpg; TOK in a caption stands for your subject. All settings
are optional. An option replaces the value in the file; docs/settings.md explains
every setting. Job files of ai-toolkit, musubi-tuner, SimpleTuner, OneTrainer,
diffusion-pipe and Replicate's trainer work, too (docs/job_files.md).

Several GPUs, each with batch_size images of every step:
  accelerate launch --multi_gpu -m trainer CONFIG.yaml

Every run gets a new folder, such as outputs/2026-11-26-imgs-01, shown in the log;
outputs/latest is the last one with a complete weights.zip. A stopped run (Ctrl-C,
SIGTERM) leaves a checkpoint. To resume it, add:
  --resume-from outputs/2026-11-26-imgs-01/checkpoints

During a run, in another terminal (RUN is its folder, or its name in outputs/):
  {program} pause RUN [--free] | resume RUN | stop RUN [--keep] | save RUN | preview RUN

The exit code is 3 if weights.zip was written but a check of the result failed, and 4
if the run was stopped or paused by a command.
"""

# Of settings and job files; others are datasets.
CONFIG_SUFFIXES = (".yaml", ".yml", ".json", *JOB_SUFFIXES)
MODES = ("plan", "check")  # without them: train
STOPPED = 4  # exit code of a run that was stopped or paused by a command
CHECKS_FAILED = 3  # exit code of a run that wrote weights.zip, but whose checks failed

LAUNCHER = "TORCHELASTIC_ERROR_FILE"  # set by torchrun and accelerate
# Whether this is the main process (rank 0); only that one logs.
IS_MAIN = os.environ.get("RANK", "0") == "0"


def arguments_parser(mode: str = "train") -> Parser:
    """The command line; every option is spelled with underscores or hyphens.

    mode: train, plan or check.
    """
    names = typed()
    parser = Parser(
        prog=names["train"],
        usage="\n       ".join(
            f"{names[each]} [CONFIG.yaml] [DATASET] [options]" for each in ("train", *MODES)
        ),
        description=DESCRIPTION.format(**names),
        epilog=EPILOG.format(**names),
    )
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="settings (.yaml), training images, or both"
    )
    parser.add_argument(
        "--cpu", action="store_true", help="run a large model without a GPU, however slow that is"
    )
    if mode != "train":
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    if mode == "plan":
        text = "plan for a launch with so many processes and GPUs on a machine"
        parser.add_argument("--gpus", type=int, default=1, metavar="N", help=text)
    if mode == "check":
        text = "write the page with all images there; default: outputs/checks/NAME.html"
        parser.add_argument("--sheet", metavar="FILE", help=text)
    add_inputs(parser, TrainingInputs, GROUPS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command in the arguments (default: `sys.argv`)."""
    try:
        claim_handed_down()
    except FolderRefused as error:
        sys.exit(f"error: {error}")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] and arguments[0] in COMMAND_NAMES:
        return give_command(arguments)
    mode = arguments[0] if arguments[:1] and arguments[0] in MODES else "train"
    parser = arguments_parser(mode)
    given = parser.read(arguments[mode != "train" :])
    cpu, debug, as_json = (given.pop(name, False) for name in ("cpu", "debug", "json"))
    sheet, gpus = given.pop("sheet", None), given.pop("gpus", 1)
    if gpus < 1:
        parser.error(f"--gpus is {gpus}; give 1 or more")
    config = take_files(given, parser)
    if as_json or mode == "check":  # nothing else on standard output
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    elif IS_MAIN:
        begin(first_line(config, given, mode == "plan"))
        log_to_console(debug=debug)
    else:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, with the models' libraries
        logging.disable(logging.WARNING)
    has_dataset = "dataset" in given
    if mode == "check":
        given = with_usual_base(given, config)
    defaults: dict[str, Any] = {"dataset": "imgs.zip"} if mode == "plan" else {}
    with one_message(debug, IS_MAIN):
        with one_message(debug, IS_MAIN, ValueError):
            settings = (
                read_config(config, defaults, **given)
                if config
                else resolve(TrainingInputs(**(defaults | given)))
            )
            if mode != "plan" or has_dataset:  # else a plan needs no images
                settings = with_local_dataset(settings)
        if mode == "check":
            sys.exit(check(settings, sheet, as_json))
        if mode == "plan":
            known = has_dataset or bool(settings.epochs)
            show_plan(settings, debug, as_json, gpus, known)
        else:
            run(settings, cpu, debug)


def take_files(given: dict[str, Any], parser: Parser) -> str | None:
    """Removes the files from the arguments; returns the settings file and sets the dataset."""
    files = given.pop("files")
    configs = [each for each in files if Path(each).suffix.lower() in CONFIG_SUFFIXES]
    datasets = [each for each in files if each not in configs]
    for name in datasets:
        if name in ("train", *MODES) and not Path(name).exists():
            parser.error(f"there is no dataset {name}; give [plan] [CONFIG.yaml] [DATASET]")
    datasets += [given["dataset"]] if "dataset" in given else []
    if len(configs) > 1 or len(datasets) > 1:
        parser.error(f"give one CONFIG.yaml and one DATASET, not {' '.join(configs + datasets)}")
    if not given and not files:
        parser.error("give a CONFIG.yaml, a DATASET, or both")
    if datasets:
        given["dataset"] = datasets[0]
    return configs[0] if configs else None


def with_local_dataset(settings: Settings) -> Settings:
    """The settings with the dataset on this machine; one of the Hub is downloaded."""
    if hub_dataset(settings.dataset) is None and not str(settings.dataset).startswith("hub:"):
        return settings
    from trainer.data import local_dataset

    return settings.replace(dataset=local_dataset(settings.dataset))


def first_line(config: str | None, given: Mapping[str, Any], planning: bool) -> str:
    """The first line of output: the run's main settings. Errors in the file are reported later."""
    asked = dict(given)
    try:
        content = parse(Path(config or ""), quiet=True)
        if program := program_of(content):
            return f"{'plan of' if planning else 'train'} {config}, a job of {program.name}"
        asked = {k: v for k, v in content.items() if isinstance(v, str)} | asked
    except Exception:  # missing or invalid: `read_config` reports it
        pass
    model = asked.get("base_model") or os.environ.get("BASE_MODEL") or "auto"
    if planning:
        return f"plan{f' of {config}' if config else ''}: base model {model}"
    output = asked.get("output_dir") or f"a new folder in {OUTPUTS}/"
    dataset = safe_source(str(asked.get("dataset", "not given")))
    named = f" {config}" if config else ""
    return f"train{named}: base model {model}, dataset {dataset}, output in {output}"


def give_command(arguments: Sequence[str]) -> None:
    """Sends a command to a run; one that has ended is resumed in this process."""
    from trainer.commands import CommandRefused, command_line

    try:
        settings = command_line(arguments)
    except (CommandRefused, OSError) as error:
        sys.exit(f"error: {error}")
    if settings is not None:
        if IS_MAIN:
            resumes = settings.resume_from is not None
            begin(
                f"resume {settings.output_dir} from its newest checkpoint"
                if resumes
                else f"train in {settings.output_dir}, which was queued"
            )
            log_to_console()
        run(settings, cpu=True)


def show_plan(
    settings: Settings,
    debug: bool = False,
    as_json: bool = False,
    gpus: int = 1,
    has_dataset: bool = False,
) -> None:
    """Prints the memory and time that the run would need, with a process for each GPU.

    has_dataset: the dataset is the user's; its control images are counted, if it exists.
    """
    from trainer.memory import describe_plan, plan_data
    from trainer.reading import with_pairs

    with one_message(debug, True, ValueError):  # lora_targets that match no layer
        needed = not as_json or settings.base.most_references > 0
        found = dataset_of(settings) if has_dataset and needed else None
        examples = found.findings.examples if found else []
        used = with_pairs(settings, examples)
        print(json.dumps(plan_data(used, gpus)) if as_json else describe_plan(used, gpus))
        if has_dataset and not as_json and (line := summary(settings, found)):
            print(f"\n{line}")


def run(settings: Settings, cpu: bool = False, debug: bool = False) -> None:
    """Trains. A user error is one line.

    cpu: run a large model also without a GPU. debug: show the traceback of an error.
    """
    from adapters.formats import BrokenLora, LoraMismatch
    from adapters.placeholder_token import PlaceholderError
    from adapters.turbo import MergeFailed
    from families.no_gpu import how_to_run_anyway, why_too_slow
    from families.quantization import QuantizationUnavailable
    from families.repository import MissingModel
    from trainer.data import DatasetError
    from trainer.learning import Diverged, ProcessLost, Stopped, ZeroPriorBroken
    from trainer.memory import TooLarge
    from trainer.result import BROKEN, Worthless
    from trainer.run import train_and_check

    user_errors = (SettingsError, DatasetError, FolderRefused, PlaceholderError, OSError)
    base = (MissingModel, QuantizationUnavailable)
    adapter = (BrokenLora, LoraMismatch, MergeFailed)
    failures = (Diverged, ProcessLost, TooLarge, Worthless, ZeroPriorBroken)
    if not cpu and (slow := why_too_slow(settings.base)):
        sys.exit(f"error: {how_to_run_anyway(slow)}" if IS_MAIN else 1)
    try:
        with one_message(debug, IS_MAIN, *user_errors, *base, *adapter, *failures):
            result = launched(train_and_check)(settings)
    except Stopped:
        sys.exit(STOPPED)
    except KeyboardInterrupt:  # the loop has logged the checkpoint's path
        sys.exit(130)
    if result.verdict is not None and result.verdict.result == BROKEN:
        sys.exit(CHECKS_FAILED)


def launched(train: Callable[..., Result]) -> Callable[..., Result]:
    """The call, whose error is written where a launcher of several processes reads it.

    At the end the launcher names the process that failed first, and its error.
    """
    if LAUNCHER not in os.environ:
        return train
    from torch.distributed.elastic.multiprocessing.errors import record

    return cast(Callable[..., Result], record(train))


if __name__ == "__main__":
    main()
