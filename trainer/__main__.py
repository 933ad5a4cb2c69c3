"""python -m trainer CONFIG.yaml: trains as a YAML file says."""

import argparse
import logging
import sys

from adapters.placeholder import PlaceholderError
from families.bases import UnknownBase
from families.repository import MissingModel
from trainer.config import read_config
from trainer.dataset import DatasetError
from trainer.run import train
from trainer.settings import SettingsError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Train a LoRA, and a new word for its subject, from 10 to 40 pictures. "
        "The result is weights.zip, for `python -m inference --weights` and for predict.",
        epilog="Start from a file in configs/: copy it, put your dataset's path in, run it. "
        "A dataset is a zip, a tar or a folder of pictures, with an optional caption in NAME.txt "
        "beside NAME.jpg; TOK in captions stands for your subject.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="settings, such as configs/*.yaml")
    parser.add_argument("--dataset", help="pictures to train on, in place of the file's")
    parser.add_argument("--output_dir", "--output-dir", help="where weights.zip is written")
    parser.add_argument("--base_model", "--base-model", help="base, in place of the file's")
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    config = arguments.pop("config")
    try:
        train(read_config(config, **{k: v for k, v in arguments.items() if v is not None}))
    except (SettingsError, DatasetError, PlaceholderError, UnknownBase, MissingModel) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
