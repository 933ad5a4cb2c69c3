"""The last lines of a run: commands that generate images with the new weights."""

import shlex
from pathlib import Path

from families.base import Base
from families.registry import by_hub_id
from inference.flags import typed

MAX_UPLOAD = 74_000_000  # bytes of a file that Cog's `@` can send: 100 MiB, encoded as base64
CONTAINER = "/src"  # where Cog mounts the project's folder


EDITED = "image.jpg"  # stands for the image to edit


def describe_next_steps(
    weights: Path, token: str | None, base: Base | None = None, instruction: str = ""
) -> str:
    """The commands, with the form of `replicate_weights` for the file's size and location.

    `instruction` is of a run on pairs: the prompt for an image of the user.

    `@` uploads the file, but only a small one. A path inside the project folder works for any size,
    if the server may read that folder. A base that is a folder of the user must be named again:
    the weights contain its name, not its path.
    """
    prompt = shlex.quote(instruction or (f"a photo of {token}" if token else "a photo"))
    here, folder = weights.absolute(), Path.cwd()
    shown = here.relative_to(folder) if here.is_relative_to(folder) else here
    lines = ["to generate:"]
    own = base.folder if base is not None and by_hub_id(base.hub_id) is None else None
    named = f" --base-model {shlex.quote(str(own))}" if own is not None else ""
    words = f"--weights {shlex.quote(str(shown))}{named} --prompt {prompt}"
    words += f" --reference-images {EDITED}" if instruction else ""
    edited = f" -i reference_images=@{EDITED}" if instruction else ""
    lines.append(f"  {typed()['generate']} {words}")
    if weights.is_dir() or own is not None:  # which Cog does not read
        return "\n".join(lines)
    size = weights.stat().st_size
    if size <= MAX_UPLOAD:
        source = shlex.quote(f"replicate_weights=@{shown}")
        lines.append(f"  cog run -i {source} -i prompt={prompt}{edited}")
    elif here.is_relative_to(folder):
        allowed = shlex.quote(f"ZEROPRIOR_FILES={CONTAINER}/{shown.parent}")
        source = shlex.quote(f"replicate_weights={CONTAINER}/{shown}")
        lines.append(f"  cog run -e {allowed} -i {source} -i prompt={prompt}{edited}")
    if size > MAX_UPLOAD:
        limit = f"@ sends at most {MAX_UPLOAD / 1e6:.0f} MB"
        elsewhere = "" if here.is_relative_to(folder) else "; for Cog, copy it into this folder"
        lines.append(f"  ({limit}, and weights.zip has {size / 1e6:.1f} MB{elsewhere})")
    return "\n".join(lines)
