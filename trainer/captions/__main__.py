"""python -m trainer.captions DATASET: writes captions for images that have none."""

import os
from collections.abc import Sequence
from pathlib import Path

from families.captioners import CAPTIONERS, UnknownCaptioner
from families.registry import BASES, UnknownBase, find_base_or_folder
from inference.console import begin, log_to_console, one_message
from inference.flags import Parser, add, typed
from inference.input_fields import parts_of
from trainer.dataset_names import safe_source

MOST_LETTERS = 1000  # of a list of words

DESCRIPTION = """\
Write a caption for every image that has none, with a vision-language model that
describes everything except the subject. TOK stands for the subject.
"""

EPILOG = """\
Example:
  {caption} imgs.zip
  {caption} imgs.zip --kind robot --avoid "red, round head, antenna"
  {caption} paintings/ --style

A folder gets NAME.txt next to NAME.jpg; a zip or tar is copied to a new zip. Own
captions are never changed. The words that captions leave out are found from the
images, and shown: if they are wrong, give --avoid and --replace. An interrupted
command continues where it was.
"""


def arguments_parser() -> Parser:
    """The command line."""
    names = typed()
    parser = Parser(
        prog=names["caption"],
        usage=f"{names['caption']} DATASET [options]",
        description=DESCRIPTION,
        epilog=EPILOG.format(**names),
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder, zip or tar of images")
    options = parser.add_argument_group("captions")
    options.add_argument(
        "--style",
        action="store_true",
        help="learn the images' style: captions say what is shown, and end with the style of TOK",
    )
    kind = "What the subject is, such as robot. Default: found from the images."
    add(options, "kind", kind, metavar="WORD", default="")
    avoid = "Words that captions must not contain, with commas. Default: found from the images."
    add(options, "avoid", avoid, metavar="WORDS", default="")
    add(
        options,
        "base_model",
        f"The model that will be trained: {', '.join(BASES)}. Its text encoder writes the captions "
        "if it sees images. Default: as for training.",
        metavar="NAME",
    )
    add(
        options,
        "model",
        f"Another model: {', '.join(CAPTIONERS)}, or a folder. Default: by the base model.",
        metavar="NAME",
    )
    add(options, "output", "The new zip. Default: NAME-captioned.zip.", type=Path, metavar="FILE")
    options.add_argument(
        "--replace",
        action="store_true",
        help="also replace captions that this command wrote with other words or another model; "
        "edited ones are kept",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command in the arguments (default: `sys.argv`). An error is one line."""
    parser = arguments_parser()
    given = parser.read(arguments)
    if given["style"] and given["kind"]:
        parser.error("--kind names a subject; remove it, or --style")
    for name in ("kind", "avoid"):
        if len(given[name]) > MOST_LETTERS:
            parser.error(f"--{name} has {len(given[name])} characters; use at most {MOST_LETTERS}")
    debug = given.pop("debug", False)
    dataset = Path(given["dataset"]).expanduser()
    begin(f"caption {safe_source(str(dataset))}")
    log_to_console(debug=debug)
    with one_message(debug):
        from families.quantization import QuantizationUnavailable
        from families.repository import MissingModel
        from families.vision_language import CaptionerTooLarge
        from trainer.captions.captioning import caption_dataset
        from trainer.captions.questions import STYLE_SET, SUBJECT_SET
        from trainer.captions.writing import Wishes
        from trainer.data import DatasetError, local_dataset

        expected = (UnknownBase, UnknownCaptioner, DatasetError, OSError)
        models = (MissingModel, QuantizationUnavailable, CaptionerTooLarge)
        with one_message(debug, True, *expected, *models):
            named = given.get("base_model", "auto")
            base = None if named == "auto" else find_base_or_folder(named)
            wishes = Wishes(
                STYLE_SET if given["style"] else SUBJECT_SET,
                given["kind"].strip(),
                parts_of(given["avoid"], ","),
                given["replace"],
            )
            chosen = given.get("model"), given.get("output")
            path, _ = caption_dataset(local_dataset(dataset), base, wishes, *chosen)
        print(os.fspath(path))


if __name__ == "__main__":
    main()
