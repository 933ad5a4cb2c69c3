"""python -m inference --prompt …: generates images from the command line."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.redact import safe_name
from families.registry import find_base_or_folder
from inference.console import begin, log_to_console, one_message
from inference.flags import Parser, add, add_inputs, typed
from inference.inputs import GROUPS, IMAGES, OUTPUT, WEIGHTS, GenerationInputs
from inference.request import Request, check_references

if TYPE_CHECKING:
    from PIL.Image import Image

    from adapters.archive import Archive

log = logging.getLogger(__name__)

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
        _batch(given, prompts, grid, folder, token, cpu, debug)
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


def _batch(
    given: dict[str, Any],
    prompts: Path | None,
    grid: Sequence[str],
    folder: Path,
    token: str | None,
    cpu: bool,
    debug: bool,
) -> None:
    """Generates the images of a file of prompts and a grid that the folder lacks."""
    from inference import batch

    with one_message(debug, True, ValueError, OSError):
        items = batch.read_batch(given, prompts, grid)
        # Files and bases that do not exist are found before the first image, not at the last.
        for base in {item.inputs.base_model for item in items} - {"auto"}:
            find_base_or_folder(base)
        read = lru_cache(maxsize=4)(_archive)
        seen = set()
        for item in items:
            each = item.inputs
            files = (
                *(each.replicate_weights, each.extra_lora, each.image, each.mask),
                *each.reference_images,
            )
            if files not in seen:
                seen.add(files)
                _read(item.inputs, token, read)

    from families.repository import MissingModel
    from inference.engine import Engine
    from inference.images import writable_folder

    with one_message(debug, True, MissingModel, OSError, ValueError):
        folder = writable_folder(folder)
        todo = len(batch.missing(items, folder))
        log.info("%d images, %d of them are already in %s/", len(items), len(items) - todo, folder)
        engine = Engine(cpu=cpu)

        def generate(inputs: GenerationInputs) -> "Image":
            request, archive, second = _read(inputs, token, read)
            return engine.generate(request, archive, inputs.base_model, second)[0]

        with batch.each_warning_once():
            refused = batch.make(items, folder, generate)
        if refused:
            raise ValueError(f"{len(refused)} images were refused: " + "\n".join(refused[:10]))
    print(folder / batch.RECORDS)


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

    return read_image(Path(path))


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
    main()
