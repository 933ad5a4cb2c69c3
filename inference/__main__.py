"""python -m inference --prompt …: draws pictures from the command line."""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from adapters.archive import BrokenArchive, read_archive, read_loose
from adapters.factors import LoraMismatch
from families.bases import BASES, UnknownBase
from families.repository import MissingModel
from inference.engine import Engine
from inference.images import save_images
from inference.request import ASPECT_RATIOS, Request


def arguments_parser() -> argparse.ArgumentParser:
    """The command line; every option is spelled with underscores or hyphens."""
    parser = argparse.ArgumentParser(
        prog="python -m inference",
        description="Draw pictures of a prompt, with trained weights laid over a base model.",
        epilog="Example: python -m inference --weights outputs/weights.zip "
        '--prompt "a photo of <zwx> on a beach" --num_outputs 4 --seed 1',
    )

    def add(name: str, help: str, **options: Any) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, help=help, dest=name, **options)

    add("prompt", "what to draw; use the trained word, such as <zwx>, for your subject", required=1)
    add("negative_prompt", "what to keep out; is read where guidance is above 1", default="")
    add("weights", "weights.zip of a training, a .tar of it, or a LoRA .safetensors", type=Path)
    add("lora_path", "a LoRA .safetensors by itself, in place of --weights", type=Path)
    add(
        "placeholder_token",
        "with --lora_path: the trained word. Its embedding is looked for "
        "beside the LoRA (placeholder.safetensors, or ../embeddings/placeholder.safetensors)",
    )
    add(
        "base_model",
        f"a folder, or one of {', '.join(BASES)} (default: what the weights were trained on)",
        default="auto",
    )
    add("lora_scale", "strength of the LoRA; 1 is as trained, 0 is off", type=float, default=1.0)
    add("width", "pixels, together with --height (default: from --aspect_ratio)", type=int)
    add("height", "pixels, together with --width", type=int)
    add("aspect_ratio", "shape at the base's own resolution", default="1:1", choices=ASPECT_RATIOS)
    add("num_outputs", "pictures to draw; number n uses the seed plus n", type=int, default=1)
    add("num_inference_steps", "denoising steps (default: as the base likes)", type=int)
    add(
        "guidance_scale",
        "how closely to follow the prompt; 1 is off (default: as the base likes)",
        type=float,
    )
    add("seed", "repeats a picture (default: drawn at random and printed)", type=int)
    add("output_dir", "folder for the pictures", type=Path, default=Path("outputs/images"))
    add("output_format", "file format", default="png", choices=["png", "webp", "jpg"])
    add("output_quality", "of webp and jpg files, from 1 to 100", type=int, default=90)
    return parser


def main() -> None:
    parser = arguments_parser()
    given = vars(parser.parse_args())
    weights, lora = given.pop("weights"), given.pop("lora_path")
    token, base_model = given.pop("placeholder_token"), given.pop("base_model")
    folder = given.pop("output_dir")
    file_format, quality = given.pop("output_format"), given.pop("output_quality")
    if weights and lora:
        parser.error("give --weights or --lora_path, not both")
    if token and not lora:
        parser.error("--placeholder_token goes with --lora_path; weights.zip knows its own")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        archive = read_loose(lora, token) if token else None
        if archive is None and (weights or lora):
            archive = read_archive(weights or lora)
        images = Engine().draw(Request(**given), archive, base_model)
    except (BrokenArchive, LoraMismatch, UnknownBase, MissingModel, ValueError) as error:
        sys.exit(f"error: {error}")
    for path in save_images(images, folder, file_format, quality):
        print(path)


if __name__ == "__main__":
    main()
