"""The last lines of a run: commands that generate images with the new weights."""

import shlex
from pathlib import Path

from inference.flags import typed

MAX_UPLOAD = 74_000_000  # bytes of a file that Cog's `@` can send: 100 MiB, encoded as base64
CONTAINER = "/src"  # where Cog mounts the project's folder


def describe_next_steps(weights: Path, token: str | None) -> str:
    """The commands, with the form of `replicate_weights` for the file's size and location.

    `@` uploads the file, but only a small one. A path inside the project folder works for any size,
    if the server may read that folder.
    """
    prompt = shlex.quote(f"a photo of {token}" if token else "a photo")
    here, folder = weights.absolute(), Path.cwd()
    shown = here.relative_to(folder) if here.is_relative_to(folder) else here
    lines = ["to generate:"]
    lines.append(f"  {typed()['generate']} --weights {shlex.quote(str(shown))} --prompt {prompt}")
    if weights.is_dir():  # of a full training, which Cog does not read
        return "\n".join(lines)
    size = weights.stat().st_size
    if size <= MAX_UPLOAD:
        source = shlex.quote(f"replicate_weights=@{shown}")
        lines.append(f"  cog run -i {source} -i prompt={prompt}")
    elif here.is_relative_to(folder):
        allowed = shlex.quote(f"ZEROPRIOR_FILES={CONTAINER}/{shown.parent}")
        source = shlex.quote(f"replicate_weights={CONTAINER}/{shown}")
        lines.append(f"  cog run -e {allowed} -i {source} -i prompt={prompt}")
    if size > MAX_UPLOAD:
        limit = f"@ sends at most {MAX_UPLOAD / 1e6:.0f} MB"
        elsewhere = "" if here.is_relative_to(folder) else "; for Cog, copy it into this folder"
        lines.append(f"  ({limit}, and weights.zip has {size / 1e6:.1f} MB{elsewhere})")
    return "\n".join(lines)
