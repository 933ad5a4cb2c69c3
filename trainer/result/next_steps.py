"""The last lines of a run: the commands that generate with the file just written."""

import shlex
from pathlib import Path

from inference.flags import typed

MOST_SENT = 74_000_000  # bytes of a file that Cog's `@` sends: 100 MiB, encoded as base64
CONTAINER = "/src"  # where Cog mounts the project's folder


def describe_next_steps(weights: Path, word: str | None) -> str:
    """The commands, with the form of `replicate_weights` that fits the file's size and place.

    A path below the project's folder always works, if the server may read its folder; `@` sends
    the file itself, and only small ones.
    """
    prompt = shlex.quote(f"a photo of {word}" if word else "a photo")
    here, folder = weights.absolute(), Path.cwd()
    size = weights.stat().st_size
    shown = here.relative_to(folder) if here.is_relative_to(folder) else here
    lines = ["to generate:"]
    lines.append(f"  {typed()['generate']} --weights {shlex.quote(str(shown))} --prompt {prompt}")
    if size <= MOST_SENT:
        source = shlex.quote(f"replicate_weights=@{shown}")
        lines.append(f"  cog run -i {source} -i prompt={prompt}")
    elif here.is_relative_to(folder):
        allowed = shlex.quote(f"ZEROPRIOR_FILES={CONTAINER}/{shown.parent}")
        source = shlex.quote(f"replicate_weights={CONTAINER}/{shown}")
        lines.append(f"  cog run -e {allowed} -i {source} -i prompt={prompt}")
    if size > MOST_SENT:
        limit = f"@ sends at most {MOST_SENT / 1e6:.0f} MB"
        elsewhere = "" if here.is_relative_to(folder) else "; for Cog, copy it below this folder"
        lines.append(f"  ({limit}, and weights.zip has {size / 1e6:.1f} MB{elsewhere})")
    return "\n".join(lines)
