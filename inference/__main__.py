"""python -m inference --prompt …: draws pictures from the command line."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.redact import safe_name
from families.registry import BASES, find_base_or_folder
from inference.console import begin, log_to_console
from inference.request import ASPECT_RATIOS, CUSTOM, FORMATS, QUALITY, Request, check_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from adapters.archive import Archive

EPILOG = """\
Examples:
  python -m inference --prompt "a photo of a red fox" --base_model z-image-turbo
  python -m inference --prompt "a photo of <zwx> on a beach" \\
      --weights outputs/latest/weights.zip --num_outputs 4 --seed 1
  python -m inference --prompt "a photo of <zwx> on a beach" \\
      --lora_path lora/lora_weights.safetensors --placeholder_token "<zwx>"
  python -m inference --prompt "a red fox as an oil painting" --image fox.jpg \\
      --prompt_strength 0.6 --weights hf:owner/name/oil.safetensors

The quotes matter: < and > mean something else to the shell. Private repositories of Hugging Face
open with the token in $HF_TOKEN.
"""


def arguments_parser() -> argparse.ArgumentParser:
    """The command line; every option is spelled with underscores or hyphens."""
    parser = argparse.ArgumentParser(
        prog="python -m inference",
        description="Draw pictures of a prompt, with trained weights laid over a base model.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, help: str, **options: Any) -> None:
        parser.add_argument(f"--{name}", help=help, **options)
        if "_" in name:  # help shows one spelling
            options |= {"dest": name, "default": argparse.SUPPRESS}
            parser.add_argument(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS, **options)

    number: dict[str, Any] = {"type": int, "metavar": "N"}
    scale: dict[str, Any] = {"type": float, "metavar": "X"}
    file: dict[str, Any] = {"type": Path, "metavar": "FILE"}

    # What to draw, and with which weights.
    add(
        "prompt",
        "what to draw; use the trained word, such as <zwx>, for your subject",
        required=True,
        metavar="TEXT",
    )
    add(
        "negative_prompt",
        "what to keep out; has an effect with a guidance above 1",
        default="",
        metavar="TEXT",
    )
    add(
        "weights",
        "weights.zip of a training, a .tar of it, or any LoRA .safetensors: a file, an https URL, "
        "or hf:owner/name/file@revision",
        metavar="FILE",
    )
    add("lora_path", "a LoRA .safetensors by itself, in place of --weights", **file)
    add(
        "placeholder_token",
        "with --lora_path: the trained word. Its embedding is looked for beside the LoRA "
        "(placeholder.safetensors, or ../embeddings/placeholder.safetensors)",
        metavar="WORD",
    )
    add(
        "lora_scale",
        "strength of the LoRA; 1 is as trained (default), 0 is off",
        default=1.0,
        **scale,
    )
    add("extra_lora", "a second LoRA over the first, named like --weights", metavar="FILE")
    add("extra_lora_scale", "strength of the second LoRA (default: 1)", **scale)
    add(
        "base_model",
        f"a folder, or one of {', '.join(BASES)} (default: what the weights were trained on)",
        default="auto",
        metavar="NAME",
    )

    add("image", "a picture to start from", **file)
    add(
        "prompt_strength",
        "how much of the image is drawn anew; 1 keeps nothing of it, 0 everything (default: 0.8)",
        **scale,
    )

    # How.
    add("width", "pixels, together with --height (default: from --aspect_ratio)", **number)
    add("height", "pixels, together with --width", **number)
    add(
        "aspect_ratio",
        f"shape at the model's own resolution: {', '.join(ASPECT_RATIOS)} "
        "(default: the image's, or 1:1)",
        choices=(*ASPECT_RATIOS, CUSTOM),
        metavar="W:H",
    )
    add(
        "num_outputs",
        "pictures to draw; number n uses the seed plus n (default: 1)",
        default=1,
        **number,
    )
    add("num_inference_steps", "denoising steps (default: what suits the model)", **number)
    add(
        "guidance_scale",
        "how closely to follow the prompt; 1 is off (default: what suits the model)",
        **scale,
    )
    add(
        "shift",
        "shift of the sigma schedule, the same at every size, such as 3 for Qwen-Image-Lightning; "
        "0 is the model's own schedule (default: a known few-step LoRA's, else the model's own)",
        **scale,
    )
    add(
        "go_fast",
        "guide only the first half of the steps: a quarter fewer passes through the model",
        action="store_true",
    )
    add("seed", "repeats a picture (default: drawn at random and printed)", **number)

    # Files.
    add(
        "output_dir",
        "folder for the pictures (default: outputs/images)",
        type=Path,
        default=Path("outputs/images"),
        metavar="FOLDER",
    )
    add("output_format", "file format (default: %(default)s)", default=FORMATS[0], choices=FORMATS)
    add(
        "output_quality",
        "of webp and jpg files, from 1 to 100 (default: %(default)s)",
        default=QUALITY,
        **number,
    )
    add(
        "no_metadata",
        "do not write prompt, seed, settings and the weights' hashes into the files",
        action="store_true",
    )
    add("cpu", "run a large model without a GPU, however slow that is", action="store_true")
    return parser


def main() -> None:
    parser = arguments_parser()
    given = vars(parser.parse_args())
    weights, lora, extra = (given.pop(name) for name in ("weights", "lora_path", "extra_lora"))
    token, base_model = given.pop("placeholder_token"), given.pop("base_model")
    folder, file_format = given.pop("output_dir"), given.pop("output_format")
    quality, metadata = given.pop("output_quality"), not given.pop("no_metadata")
    image = given.pop("image")
    if weights and lora:
        parser.error("give --weights or --lora_path, not both")
    if token and not lora:
        parser.error("--placeholder_token goes with --lora_path; weights.zip knows its own")
    if given["extra_lora_scale"] is not None and not extra:
        parser.error("--extra_lora_scale goes with --extra_lora")
    cpu = given.pop("cpu")
    begin(_first_line(base_model, weights or lora, folder))
    log_to_console()
    try:
        if base_model != "auto":
            find_base_or_folder(base_model)
        check_file(file_format, quality)
        request = Request(image=_image(image), **given)
        archive = _archive(weights or lora, token)
        second = _archive(extra)
    except ValueError as error:
        sys.exit(f"error: {error}")

    # The libraries of the models take seconds to import, which a mistake need not wait for.
    from adapters.formats import LoraMismatch
    from families.repository import MissingModel
    from inference.engine import Engine
    from inference.images import save_images, writable_folder

    try:
        folder = writable_folder(folder)
        images = Engine(cpu=cpu).generate(request, archive, base_model, second)
        paths = save_images(images, folder, file_format, quality, metadata)
    except (LoraMismatch, MissingModel, OSError, ValueError) as error:  # UnknownBase among them
        sys.exit(f"error: {error}")
    print(*paths, sep="\n")


def _first_line(base_model: str, weights: str | Path | None, folder: Path) -> str:
    """What is about to run, before anything is imported or read that takes time."""
    named = os.environ.get("BASE_MODEL") or "auto"
    model = "of the weights" if base_model == "auto" and weights else base_model
    model = named if model == "auto" else model
    source = f", weights {safe_name(str(weights))}" if weights else ""
    return f"generate: base model {model}{source}, images in {folder}/"


def _image(path: Path | None) -> "Image | None":
    if not path:
        return None
    from inference.images import read_image

    return read_image(path)


def _archive(source: str | Path | None, token: str | None = None) -> "Archive | None":
    """The archive of a file or a name; whoever types the command may read any file.

    token: the placeholder of a LoRA that is a file by itself.
    """
    if not source:
        return None
    from adapters.archive import read_archive, read_loose
    from inference.fetch import Sources, named

    if token:
        return read_loose(source, token)
    sources, secret = Sources(), os.environ.get("HF_TOKEN")
    file, config = sources.file(source, secret), sources.config(source, secret)
    archive = read_archive(file, config=config)
    return named(archive, source)


if __name__ == "__main__":
    main()
