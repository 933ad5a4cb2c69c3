"""What the text of a prompt asks for beyond its words: the subject, and options of other programs.

TOK stands for the subject's token. Options such as `--w 64` are read behind sample prompts
(`read_options`); wherever syntax of other programs is plain text here, `foreign_syntax` finds it.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import TYPE_CHECKING, Any

from families.text_limit import cut
from families.tokens import SUBJECT, mentions, name_subject
from inference.request import Request, ResolvedRequest

if TYPE_CHECKING:
    from torch import Tensor

    from families.family import Family

log = logging.getLogger(__name__)

# Options of kohya's scripts, ai-toolkit and Midjourney, and the fields of a request that they are.
OPTIONS: dict[str, tuple[str, type] | None] = {
    "w": ("width", int),
    "h": ("height", int),
    "s": ("num_inference_steps", int),
    "d": ("seed", int),
    "n": ("negative_prompt", str),
    "l": ("guidance_scale", float),
    "g": ("guidance_scale", float),
    "ar": ("aspect_ratio", str),
    "seed": ("seed", int),
    "steps": ("num_inference_steps", int),
    "width": ("width", int),
    "height": ("height", int),
    "no": ("negative_prompt", str),
    **dict.fromkeys(("neg", "negative", "negative_prompt"), ("negative_prompt", str)),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "guidance_scale"), ("guidance_scale", float)),
    # Those without a counterpart.
    **dict.fromkeys(("am", "c", "cn", "ci", "ctrl_img", "f", "fps", "fs", "i", "il", "is", "m")),
    **dict.fromkeys(("network_multiplier", "num_frames", "of", "ow", "r", "sd", "ss", "v")),
    **dict.fromkeys(("style", "stylize", "chaos", "q", "iw", "niji", "tile", "weird")),
}
_OPTION = re.compile(r"(?:^|\s)--([a-z_]\w*)(?=[\s=]|$)", re.IGNORECASE)

_FOREIGN = (
    re.compile(r"<(?:lora|lyco|hypernet|embedding):[^<>]{1,200}>", re.IGNORECASE),
    re.compile(r"[(\[][^()\[\]]{1,200}:\s*\d*\.?\d+[)\]]"),  # (word:1.2), [from:to:0.5]
    re.compile(r"\[(?:trigger|name|filewords)\]"),
    re.compile(r"\{[^{}|]{0,200}\|[^{}]{0,200}\}"),  # {red|blue}
    re.compile(r"\b__[\w/-]{1,60}__\b"),
    re.compile(r"(?<!\S)BREAK(?!\S)"),
    re.compile(r"^Negative prompt:", re.MULTILINE),
    re.compile(r"(?<!\S)--[a-z_]+(?=[\s=]|$)", re.IGNORECASE),
)


def foreign_syntax(text: str) -> list[str]:
    """The parts of a text that other programs read as something else than words."""
    found = [match[0].strip() for pattern in _FOREIGN for match in pattern.finditer(text)]
    return list(dict.fromkeys(found))


def read_options(prompt: str) -> tuple[str, dict[str, Any], list[str]]:
    """A prompt without the options behind it, the request's fields they set, and those not read.

    They begin with the first that is known. Raises ValueError for an option whose value is not what
    it takes.
    """
    found = list(_OPTION.finditer(prompt))
    starts = list(dropwhile(lambda match: match[1].lower() not in OPTIONS, found))
    if not starts:
        return prompt, {}, []
    fields: dict[str, Any] = {}
    unread = []
    ends = [match.start() for match in starts[1:]] + [len(prompt)]
    for match, end in zip(starts, ends, strict=True):
        name, value = match[1].lower(), prompt[match.end() : end].strip().removeprefix("=").strip()
        option = OPTIONS.get(name)
        if option is None or (name == "g" and "guidance_scale" in fields):
            unread.append(f"--{name} {value}".strip())
            continue
        field, kind = option
        try:
            fields[field] = kind(value)
        except ValueError:
            wanted = {int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"--{name} is {value!r}; it takes {wanted}") from None
        if field == "guidance_scale":
            fields[field] = max(1.0, fields[field])  # what is below 1 is off there, as 1 is here
    return prompt[: starts[0].start()].strip(), fields, unread


def place_subject(request: Request, tokens: Sequence[str]) -> Request:
    """The request with the first token in place of TOK in its prompts; says what it did."""
    texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt or ""}
    placed = {name: name_subject(text, (*tokens, SUBJECT)[0]) for name, text in texts.items()}
    # A token such as <TOK> is none that is still to be replaced.
    holding = [
        name
        for name, text in texts.items()
        if (text != placed[name] if tokens else mentions(text, SUBJECT))
    ]
    if not holding:
        return request
    where = " and ".join(holding)
    if not tokens:
        log.warning("TOK in %s is read as plain text: the weights have no placeholder token", where)
        return request
    log.info("TOK in %s stands for %s", where, tokens[0])
    if len(tokens) > 1:
        log.warning(
            "TOK stands for %s, the token of the first LoRA; write %s for the other",
            *(tokens[0], ", ".join(tokens[1:])),
        )
    return request.replace(prompt=placed["prompt"], negative_prompt=placed["negative_prompt"])


def check_syntax(name: str, text: str) -> None:
    """Warns of syntax of other programs, which is plain text in the prompt of this name."""
    if found := foreign_syntax(text):
        log.warning(
            "%s holds syntax of other programs, which is plain text here: %s",
            *(name, ", ".join(found[:5])),
        )


def check_length(
    family: "Family",
    texts: Mapping[str, str],
    vectors: "Mapping[str, Tensor] | None" = None,
    word: str | None = None,
) -> None:
    """Warns of each of the texts, by its name, that is longer than the text encoder reads.

    That a trained token is lost with it is said first; `word` is one that is plain text.
    """
    words = [*(vectors or {}), *([word] if word else [])]
    for name, text in texts.items():
        found = cut(family, text, vectors)
        if found is None:
            continue
        gone = [each for each in words if mentions(text, each) and not found.keeps(each)]
        log.warning(
            "%s%s is longer than the %d tokens that are read; lost from here on: %r",
            f"{', '.join(gone)} is lost: " if gone else "",
            *(name, family.max_text_tokens, found.first_lost()),
        )


def prompts_of(resolved: ResolvedRequest) -> dict[str, str]:
    """The texts that the text encoder reads for it, by their names."""
    texts = {"prompt": resolved.prompt}
    if resolved.negative_prompt and resolved.guidance_scale > 1:
        texts["negative_prompt"] = resolved.negative_prompt
    return texts
