"""python -m trainer CONFIG.yaml: trains as a YAML file says."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import yaml

from families.redact import safe_name
from inference.console import begin, log_to_console
from trainer.lock import FolderRefused, claim_handed_down
from trainer.outputs import OUTPUTS

if TYPE_CHECKING:
    from trainer.settings import Settings

DESCRIPTION = """\
Train a LoRA, and with it a new word for its subject, from 10 to 40 pictures.
The result is weights.zip, for `python -m inference --weights` and for predict.
"""

EPILOG = """\
Example:
  python -m trainer plan configs/z_image_turbo.yaml     memory and time, no GPU needed
  python -m trainer configs/z_image_turbo.yaml --dataset imgs.zip
  python -m inference --weights outputs/latest/weights.zip --prompt "a photo of <zwx>"

A dataset is a zip, a tar or a folder of pictures, with an optional caption in
NAME.txt beside NAME.jpg; TOK in a caption stands for your subject. For other
settings copy a file of configs/ and change the copy; its comments say what is
what, and docs/training.md says it at length. A job file of ai-toolkit's for
Qwen-Image or Z-Image is taken, too. With LOG_PROMPT_IDS=1 before the command it
shows how captions are read.

Several GPUs, each with batch_size pictures of every step:
  accelerate launch --multi_gpu -m trainer CONFIG.yaml

Every run has a folder of its own, such as outputs/2026-11-26-imgs-01, which the
log names; outputs/latest is the last one with a complete weights.zip. A stopped
run (Ctrl-C, SIGTERM) leaves a checkpoint. To resume it, set under `train`:
  resume_from: outputs/2026-11-26-imgs-01/checkpoints

The exit code is 3 if weights.zip was written but a check of the result failed.
"""

CHECKS_FAILED = 3  # exit code of a run that wrote weights.zip, but whose checks failed

# Process rank; only rank 0 logs.
SPEAKS = os.environ.get("RANK", "0") == "0"


def arguments_parser() -> argparse.ArgumentParser:
    """The command line; every option is spelled with underscores or hyphens."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="settings; see the files in configs/")
    for name, metavar, help in (
        ("dataset", "PATH", "pictures to train on, in place of the file's"),
        ("output_dir", "FOLDER", "the run's own folder (default: a new one below outputs/)"),
        ("name", "NAME", "in the new folder's name, outputs/DATE-NAME-NN (default: the dataset's)"),
        ("base_model", "NAME", "model to train on, in place of the file's"),
    ):
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, metavar=metavar, help=help)
    parser.add_argument(
        "--allow_failed_checks",
        "--allow-failed-checks",
        action="store_const",
        const=True,
        help="upload to hf_repo_id even if a check of the result fails",
    )
    parser.add_argument(
        "--cpu", action="store_true", help="run a large model without a GPU, however slow that is"
    )
    return parser


def parsed(words: list[str]) -> argparse.Namespace:
    """The command line's values; what it does not know is an error that says where settings go."""
    parser = arguments_parser()
    given, unknown = parser.parse_known_args(words)
    for word in unknown:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].replace("-", "_")
            parser.error(f"unknown option {word}; settings are in the file: train: {{{name}: …}}")
    if given.config in ("train", "plan"):  # plan comes first, and train is what is done anyway
        parser.error(f"{given.config} {' '.join(unknown)}: give [plan] CONFIG.yaml alone")
    if unknown:
        parser.error(f"unknown words: {' '.join(unknown)}; one CONFIG.yaml is read")
    return given


def main() -> None:
    try:
        claim_handed_down()
    except FolderRefused as error:
        sys.exit(f"error: {error}")
    words = sys.argv[1:]
    planning = words[:1] == ["plan"]
    given = vars(parsed(words[planning:]))
    config, cpu = given.pop("config"), given.pop("cpu")
    overrides = {k: v for k, v in given.items() if v is not None}
    if SPEAKS:
        begin(first_line(config, overrides, planning))
        log_to_console()
    else:
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported, with the models' libraries
        logging.disable(logging.WARNING)
    if planning:
        overrides.setdefault("dataset", "imgs.zip")  # never read: a plan needs no pictures

    # PyTorch takes seconds to import.
    from trainer.settings import SettingsError, read_config

    try:
        settings = read_config(config, **overrides)
    except SettingsError as error:
        sys.exit(f"error: {error}" if SPEAKS else 1)
    show_plan(settings) if planning else run(settings, cpu)


def first_line(config: str, overrides: Mapping[str, str], planning: bool) -> str:
    """What is about to run, as far as the file says it; what is wrong with it is said later."""
    try:
        with open(config, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        asked = {k: v for k, v in content.items() if isinstance(v, str)} | dict(overrides)
    except Exception:  # not there, no YAML, not keys: `read_config` has the right words
        asked = dict(overrides)
    model = asked.get("base_model") or os.environ.get("BASE_MODEL") or "auto"
    if planning:
        return f"plan of {config}: base model {model}"
    output = asked.get("output_dir") or f"a new folder in {OUTPUTS}/"
    dataset = safe_name(asked.get("dataset", "not given"))
    return f"train {config}: base model {model}, dataset {dataset}, output in {output}"


def show_plan(settings: "Settings") -> None:
    """Prints what the training would take in memory and time."""
    from trainer.memory import describe_plan

    try:
        print(describe_plan(settings))
    except ValueError as error:  # lora_targets that fit no layer
        sys.exit(f"error: {error}")


def run(settings: "Settings", cpu: bool = False) -> None:
    """Trains. A mistake of the user is one line.

    cpu: run a large model also without a GPU.
    """
    from adapters.formats import BrokenLora, LoraMismatch
    from adapters.placeholder_token import PlaceholderError
    from adapters.turbo import MergeFailed
    from families.no_gpu import how_to_run_anyway, why_too_slow
    from families.quantization import QuantizationUnavailable
    from families.repository import MissingModel
    from trainer.data import DatasetError
    from trainer.learning import Diverged, ZeroPriorBroken
    from trainer.memory import TooLarge
    from trainer.result import BROKEN, Worthless
    from trainer.run import train_and_check
    from trainer.settings import SettingsError

    mendable = (SettingsError, DatasetError, FolderRefused, PlaceholderError, OSError)
    base = (MissingModel, QuantizationUnavailable)
    adapter = (BrokenLora, LoraMismatch, MergeFailed)
    bad_end = (Diverged, TooLarge, Worthless, ZeroPriorBroken)
    if not cpu and (slow := why_too_slow(settings.base)):
        sys.exit(f"error: {how_to_run_anyway(slow)}" if SPEAKS else 1)
    try:
        result = train_and_check(settings)
    except (*mendable, *base, *adapter, *bad_end) as error:
        sys.exit(f"error: {error}" if SPEAKS else 1)
    except KeyboardInterrupt:  # the loop has said by then where its checkpoint lies
        sys.exit(130)
    if result.verdict is not None and result.verdict.result == BROKEN:
        sys.exit(CHECKS_FAILED)


if __name__ == "__main__":
    main()
