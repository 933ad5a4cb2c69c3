"""python -m trainer CONFIG.yaml: trains as a YAML file says."""

import argparse
import sys

from adapters.placeholder import PlaceholderError
from families.repository import MissingModel
from inference.console import log_to_console
from trainer.config import read_config
from trainer.dataset import DatasetError
from trainer.settings import Settings, SettingsError

DESCRIPTION = """\
Train a LoRA, and with it a new word for its subject, from 10 to 40 pictures.
The result is weights.zip, for `python -m inference --weights` and for predict.
"""

EPILOG = """\
Example:
  python -m trainer configs/z_image_turbo.yaml --dataset imgs.zip
  python -m inference --weights outputs/weights.zip --prompt "a photo of <zwx>"

A dataset is a zip, a tar or a folder of pictures, with an optional caption in
NAME.txt beside NAME.jpg; TOK in a caption stands for your subject. For other
settings copy a file of configs/ and change the copy; its comments say what is
what. With LOG_PROMPT_IDS=1 before the command it shows how captions are read.
"""


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
        ("output_dir", "FOLDER", "where weights.zip is written, in place of the file's"),
        ("base_model", "NAME", "model to train on, in place of the file's"),
    ):
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, metavar=metavar, help=help)
    return parser


def main() -> None:
    given = vars(arguments_parser().parse_args())
    log_to_console()
    config = given.pop("config")
    try:
        settings = read_config(config, **{k: v for k, v in given.items() if v is not None})
    except SettingsError as error:
        sys.exit(f"error: {error}")
    run(settings)


def run(settings: Settings) -> None:
    """Trains, and says what went wrong in one line where the user can mend it."""
    # The libraries of the models take seconds to import, which a mistyped setting need not wait.
    from adapters.factors import LoraMismatch
    from adapters.lora_file import BrokenLora
    from adapters.turbo import MergeFailed
    from trainer.loop import Diverged
    from trainer.run import train
    from trainer.zero_prior import ZeroPriorBroken

    mendable = (SettingsError, DatasetError, PlaceholderError, MissingModel, OSError)
    adapter = (BrokenLora, LoraMismatch, MergeFailed)
    try:
        train(settings)
    except (*mendable, *adapter, Diverged, ZeroPriorBroken) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # the loop has said by then where its checkpoint lies
        sys.exit(130)


if __name__ == "__main__":
    main()
