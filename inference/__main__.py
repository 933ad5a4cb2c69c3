"""python -m inference --prompt …: generates images from the command line."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from families.redact import safe_name
from families.registry import find_base_or_folder
from inference.console import begin, log_to_console, one_message, stopped_quietly
from inference.flags import Parser, add, add_inputs, typed
from inference.inputs import GROUPS, IMAGES, OUTPUT, WEIGHTS, GenerationInputs
from inference.request import Request, check_references

if TYPE_CHECKING:
    from PIL.Image import Image

    from adapters.archive import Archive

EPILOG = """\
Examples:
  {generate} --prompt "a photo of a red fox" --base z-image-turbo
  {generate} --prompt "a photo of <zwx> on a beach" \\
      --weights outputs/latest/weights.zip --num-outputs 4 --seed 1
  {generate} --prompt "a photo of <zwx> on a beach" \\
      --lora-path lora/lora_weights.safetensors --placeholder-token "<zwx>"
  {generate} --prompts prompts.txt --grid seed=0-9 \\
      --weights outputs/latest/weights.zip --output-dir outputs/many
  {generate} --prompt "a red fox as an oil painting" --image fox.jpg \\
      --prompt-strength 0.6 --weights hf:owner/name/oil.safetensors
  {generate} --base qwen-image-edit-2511 \\
      --prompt "put the cup of Picture 2 on the table of Picture 1" \\
      --reference-images table.jpg cup.jpg

Quote the prompt: the shell interprets < and >. For private repositories on Hugging Face, set
$HF_TOKEN.
"""


def arguments_parser() -> Parser:
    """The command line; options may be spelled with underscores or hyphens."""
    parser = Parser(
        prog=typed()["generate"],
        usage="%(prog)s --prompt TEXT [--weights FILE] [options]",
        description="Generate images from a prompt, with an optional LoRA.",
        epilog=EPILOG.format(**typed()),
    )
    add(parser, "cpu", "run a large model without a GPU, however slow that is", action="store_true")
    others = ("replicate_weights", "lora_weights", "output_metadata")  # different names here
    groups = add_inputs(parser, GenerationInputs, GROUPS, without=others)
    weights, output = groups[WEIGHTS], groups[OUTPUT]
    source = GenerationInputs.inputs()["replicate_weights"].description
    add(weights, "weights", source, metavar="FILE")
    add(
        weights,
        "lora_path",
        "A single LoRA .safetensors file, instead of --weights.",
        metavar="FILE",
        type=Path,
    )
    add(
        weights,
        "placeholder_token",
        "With --lora-path: the trained token. Its embedding is read from next to the LoRA "
        "(placeholder.safetensors, or ../embeddings/placeholder.safetensors).",
        metavar="TOKEN",
    )
    batch = parser.add_argument_group("many images")
    add(
        batch,
        "prompts",
        "File of prompts, instead of --prompt: a text file with one per line, or .jsonl with an "
        'object of inputs per line, such as {"prompt": "a photo of <zwx>", "seed": 7}. Images that '
        "are already in the folder are not generated again; the settings of all are in its "
        "images.jsonl.",
        metavar="FILE",
        type=Path,
    )
    add(
        batch,
        "grid",
        "An image for each value of an input, such as seed=0-99 or lora_scale=0.6,0.8,1. Several "
        "--grid: all combinations.",
        metavar="NAME=VALUES",
        action="append",
    )
    add(
        output,
        "output_dir",
        "Folder for the images. Default: outputs/images.",
        metavar="FOLDER",
        type=Path,
        default=IMAGES,
    )
    add(
        output,
        "no_metadata",
        "Do not write prompt, settings and hashes into the files.",
        dest="output_metadata",
        action="store_false",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Generates images with the arguments (default: `sys.argv`)."""
    parser = arguments_parser()
    given = parser.read(arguments)
    debug = given.pop("debug", False)
    weights, lora = given.pop("weights", None), given.pop("lora_path", None)
    token, folder = given.pop("placeholder_token", None), given.pop("output_dir")
    cpu = bool(given.pop("cpu", False))
    prompts, grid = given.pop("prompts", None), given.pop("grid", [])
    if weights and lora:
        parser.error("give --weights or --lora-path, not both")
    if token and not lora:
        parser.error("--placeholder-token needs --lora-path; weights.zip contains its token")
    if prompts and "prompt" in given:
        parser.error("give --prompt or --prompts, not both")
    begin(_first_line(given.get("base_model", "auto"), weights or lora, folder))
    log_to_console(debug=debug)
    given["replicate_weights"] = weights or lora
    if prompts or grid:
        from families.repository import MissingModel
        from inference.batch import generate_batch
        from inference.batch_items import read_batch

        archive_of = lru_cache(maxsize=4)(_archive)
        with one_message(debug, True, MissingModel, OSError, ValueError):
            items = read_batch(given, prompts, grid)
            print(generate_batch(items, folder, lambda each: _read(each, token, archive_of), cpu))
        return
    with one_message(debug, True, ValueError):
        inputs = GenerationInputs(**given)
        request, archive, second = _read(inputs, token)

    # The model libraries take seconds to import; errors in the inputs are reported before.
    from adapters.formats import LoraMismatch
    from families.repository import MissingModel
    from inference.engine import Engine
    from inference.images import save_images, writable_folder

    # An UnknownBase is a ValueError.
    with one_message(debug, True, LoraMismatch, MissingModel, OSError, ValueError):
        folder = writable_folder(folder)
        images = Engine(cpu=cpu).generate(request, archive, inputs.base_model, second)
        paths = save_images(
            images,
            folder,
            inputs.output_format,
            inputs.output_quality,
            inputs.output_metadata,
        )
    print(*paths, sep="\n")


def _read(
    inputs: GenerationInputs,
    token: str | None,
    archive: "Callable[[str | Path | None, str | None], Archive | None] | None" = None,
) -> "tuple[Request, Archive | None, Archive | None]":
    """The request, the weights and the second LoRA of these inputs, from their files."""
    if inputs.base_model != "auto":
        check_references(len(inputs.reference_images), find_base_or_folder(inputs.base_model))
    archive = archive or _archive
    request = Request.of(inputs, _image)
    return request, archive(inputs.replicate_weights, token), archive(inputs.extra_lora, None)


def _first_line(base_model: str, weights: str | Path | None, folder: Path) -> str:
    """The first line of output, printed before slow imports."""
    named = os.environ.get("BASE_MODEL") or "auto"
    model = "of the weights" if base_model == "auto" and weights else base_model
    model = named if model == "auto" else model
    source = f", weights {safe_name(str(weights))}" if weights else ""
    return f"generate: base model {model}{source}, images in {folder}/"


def _image(name: str, path: Path | str) -> "Image":
    from inference.images import read_image

    return read_image(Path(path), name)


def _archive(source: str | Path | None, token: str | None) -> "Archive | None":
    """The archive of a path, URL or name. The user is trusted and may read any file.

    token: the placeholder token of a LoRA that is a single file.
    """
    if not source:
        return None
    from adapters.archive import read_loose
    from adapters.trained_model import read_weights
    from inference.fetch import Sources, named

    if token:
        return read_loose(source, token)
    sources, secret = Sources(), os.environ.get("HF_TOKEN")
    file, config = sources.file(source, secret), sources.config(source, secret)
    archive = read_weights(file, config)
    return named(archive, source)


if __name__ == "__main__":
    with stopped_quietly("--debug" in sys.argv):
        main()
